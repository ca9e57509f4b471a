// Causal attention of prefill rows over the paged cache (PagedAttention, Kwon et al. 2023), which
// already holds their own keys: forward as in training, keys and values found through the block
// list. Sequences of one row are left to attention_decode.cu, unless all go this way.

/// Finds tile number `tile` among the tiles of 128 rows of all sequences with `least` rows or more:
/// its sequence, −1 when there are fewer tiles, and its first row in it. All warps find the same.
__device__ __forceinline__ int find_tile(
    const int* sequences, int count, int least, int tile, int& first) {
    int lane = threadIdx.x % 32;
    for (int base = 0; base < count; base += 32) {
        int at = base + lane;
        int rows = at < count ? sequences[at * SEQUENCE_WIDTH + SEQUENCE_ROWS] : 0;
        int tiles = rows >= least ? (rows + QUERY_TILE - 1) / QUERY_TILE : 0, sum = tiles;
#pragma unroll
        for (int distance = 1; distance < 32; distance <<= 1) {
            int before = __shfl_up_sync(~0u, sum, distance);
            if (lane >= distance) sum += before;
        }
        u32 beyond = __ballot_sync(~0u, sum > tile);
        if (beyond) {
            int owner = __ffs(beyond) - 1;
            first = (tile - __shfl_sync(~0u, sum - tiles, owner)) * QUERY_TILE;
            return base + owner;
        }
        tile -= __shfl_sync(~0u, sum, 31);
    }
    return -1;
}

/// Tiles of one query head: this block's and every `gridDim.y`-th after it, for as many as there
/// are is known only to the table.
template <int D>
__device__ __forceinline__ void prefill(
    bf16* o, const bf16* qkv, const bf16* k, const bf16* v, const int* sequences,
    const int* blocks, int count, int least, int block_size, int q_heads, int kv_heads, int dim,
    float scale2) {
    int head = blockIdx.x, column = head / (q_heads / kv_heads) * dim;
    int stride = (q_heads + 2 * kv_heads) * dim, first = 0;
    bool chunks = by_chunks(k, dim) && by_chunks(v, dim);
    Softmax<D, 2> state;
    for (int tile = blockIdx.y;; tile += gridDim.y) {
        int sequence = find_tile(sequences, count, least, tile, first);
        if (sequence < 0) return;
        const int* entry = sequences + sequence * SEQUENCE_WIDTH;
        int row = entry[SEQUENCE_ROW] + first;
        Piece piece = {entry[SEQUENCE_POSITION] + first, 0,
                       min(entry[SEQUENCE_ROWS] - first, QUERY_TILE)};
        Rows queries = {qkv + (long long)row * stride + head * dim, stride};
        load_rows<D, QUERY_TILE, QUERY_THREADS>(
            (bf16*)attention_shared, queries, 0, piece.to, dim, by_chunks(qkv, dim), threadIdx.x);
        PagedKeys source = {k + column, v + column, blocks + entry[SEQUENCE_BLOCKS], block_size,
                            kv_heads * dim};
        attend<D>(state, source, piece, dim, scale2, chunks);
        bf16* to = o + ((long long)row * q_heads + head) * dim;
        store_piece<D>(to, nullptr, state, piece, q_heads, dim, scale2);
    }
}

/// `o (N, Q·D)` of the rows of sequences with `least` rows or more, at least 1; `count` sequences;
/// the cache is `(blocks · block_size, K·D)`; `scale` = 1 / sqrt(dim).
/// Grid (Q, any number of blocks: they share the tiles), 128 threads.
#define ATTENTION_PREFILL(D, NAME)                                                              \
    extern "C" __global__ void __launch_bounds__(QUERY_THREADS, 2)                            \
        NAME(bf16* o, const bf16* qkv, const bf16* k, const bf16* v, const int* sequences,      \
             const int* blocks, int count, int least, int block_size, int q_heads,              \
             int kv_heads, int dim, float scale) {                                              \
        prefill<D>(o, qkv, k, v, sequences, blocks, count, least, block_size, q_heads,          \
                   kv_heads, dim, scale * LOG2_E);                                              \
    }

ATTENTION_PREFILL(64, attention_prefill_64)
ATTENTION_PREFILL(128, attention_prefill_128)
