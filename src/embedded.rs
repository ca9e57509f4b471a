//! The demo base, compiled into the binary: what `serve` serves when no other base is named.

use worker::base::{BaseError, BaseFiles};

/// Name under which it is served by default.
pub const NAME: &str = "demo";

/// Files in Hugging Face layout; made by `demo/train_base.py`.
const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../demo/base/config.json")),
    ("generation_config.json", include_bytes!("../demo/base/generation_config.json")),
    ("tokenizer.json", include_bytes!("../demo/base/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../demo/base/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../demo/base/chat_template.jinja")),
    ("model.safetensors", include_bytes!("../demo/base/model.safetensors")),
];

/// Opens the embedded base.
pub fn open() -> Result<BaseFiles, BaseError> {
    BaseFiles::from_bytes(FILES)
}

/// Bytes of its weight file.
pub fn weight_bytes() -> u64 {
    let weights = FILES.iter().filter(|(name, _)| name.ends_with(".safetensors"));
    weights.map(|(_, bytes)| bytes.len() as u64).sum()
}
