// Causal attention of training rows over their own example in the arena: FlashAttention-2 (Dao
// 2023), forward. Backward is in attention_backward.cu.

/// One tile of rows of one query head, example by example.
template <int D>
__device__ __forceinline__ void train_tile(
    bf16* o, float* lse, const bf16* qkv, const int* examples, int first, int rows, int q_heads,
    int kv_heads, int dim, float scale2) {
    // Later tiles see more keys: they start first.
    int tile = (gridDim.y - 1 - blockIdx.y) * QUERY_TILE;
    int head = blockIdx.x, kv_head = head / (q_heads / kv_heads), thread = threadIdx.x;
    int count = min(rows - tile, QUERY_TILE), arena = first + tile;
    int stride = (q_heads + 2 * kv_heads) * dim;
    bool chunks = by_chunks(qkv, dim);
    Rows queries = {qkv + (long long)arena * stride + head * dim, stride};
    load_rows<D, QUERY_TILE, QUERY_THREADS>(
        (bf16*)attention_shared, queries, 0, count, dim, chunks, thread);
    int example = thread < count ? examples[arena + thread] : -1;
    Softmax<D, 2> state;
    Piece piece = {0, 0, 0};
    while (piece.to < count) {
        int start = examples[arena + piece.to];
        piece.from = piece.to;
        piece.to += __syncthreads_count(thread >= piece.from && example == start);
        piece.place = arena - start;
        const bf16* keys = qkv + (long long)start * stride + (q_heads + kv_head) * dim;
        ArenaKeys source = {keys, keys + kv_heads * dim, stride};
        attend<D>(state, source, piece, dim, scale2, chunks);
        long long out = (long long)tile * q_heads + head;
        store_piece<D>(o + out * dim, lse + out, state, piece, q_heads, dim, scale2);
    }
}

/// `o (n, Q·D)` and `lse (n, Q)` of arena rows `first .. first + n`; `qkv` is the arena,
/// `examples` the arena row where each arena row's example starts. `scale` = 1 / sqrt(dim).
/// Grid (Q, ⌈n / 128⌉), 128 threads.
#define ATTENTION_TRAIN(D, NAME)                                                                \
    extern "C" __global__ void __launch_bounds__(QUERY_THREADS, 2)                            \
        NAME(bf16* o, float* lse, const bf16* qkv, const int* examples, int first, int rows,    \
             int q_heads, int kv_heads, int dim, float scale) {                                 \
        train_tile<D>(o, lse, qkv, examples, first, rows, q_heads, kv_heads, dim,               \
                      scale * LOG2_E);                                                          \
    }

ATTENTION_TRAIN(64, attention_train_64)
ATTENTION_TRAIN(128, attention_train_128)
