//! A tar archive as a stream, from files whose sizes are known.

use std::io;

use bytes::{Bytes, BytesMut};
use futures::stream::BoxStream;
use futures::{Stream, StreamExt, TryStreamExt, stream};
use tar::Header;

/// Everything in a tar archive comes in blocks of this many bytes.
const BLOCK_BYTES: u64 = 512;

/// A file on its way: size and bytes.
pub type FileStream = (u64, BoxStream<'static, storage::Result<Bytes>>);

/// The archive's size and its bytes; `modified_at` in Unix seconds.
pub fn archive(
    files: Vec<(&'static str, FileStream)>,
    modified_at: i64,
) -> (u64, impl Stream<Item = io::Result<Bytes>> + Send + 'static) {
    let ending = 2 * BLOCK_BYTES;
    let total = files.iter().map(|(_, (bytes, _))| BLOCK_BYTES + padded(*bytes)).sum::<u64>();
    let entries = files.into_iter().map(move |(name, (bytes, chunks))| {
        let head = stream::once(async move { head(name, bytes, modified_at) });
        let padding = zeros(padded(bytes) - bytes);
        head.chain(chunks.map_err(io::Error::other)).chain(padding).boxed()
    });
    let entries: Vec<_> = entries.collect();
    (total + ending, stream::iter(entries).flatten().chain(zeros(ending)))
}

fn padded(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES) * BLOCK_BYTES
}

fn head(name: &str, bytes: u64, modified_at: i64) -> io::Result<Bytes> {
    let mut header = Header::new_ustar();
    header.set_path(name)?;
    header.set_size(bytes);
    header.set_mode(0o644);
    header.set_mtime(modified_at.max(0) as u64);
    header.set_cksum();
    Ok(Bytes::copy_from_slice(header.as_bytes()))
}

fn zeros(count: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stream::once(async move { Ok(BytesMut::zeroed(count as usize).freeze()) })
}
