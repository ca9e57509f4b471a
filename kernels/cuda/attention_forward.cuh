// Forward of training and of prefill: tiles of 128 queries, 4 warps of 32, over steps of 64 keys.
// Compiled after attention.cuh.

/// Keys of a step.
constexpr int KEY_TILE = 64;

/// Shared memory of forward: the tile of queries, then two stages of keys and values.
template <int D>
constexpr int FORWARD_SHARED = (QUERY_TILE + 4 * KEY_TILE) * D * 2;

/// Hides keys after a row's own: the accumulator's first row stands at `row`, first column at
/// `key`.
template <int M, int N>
__device__ __forceinline__ void hide_future(float (&s)[M][N][4], int row, int key) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (key + n * 8 + part_column(e) > row + m * 16 + part_row(e))
                    s[m][n][e] = -infinity();
}

/// Attention of a piece: 4 warps of 32 rows over the keys `0 ..= ` its last row's position. The
/// queries are in shared memory or on their way; at return all keys have been read.
template <int D, class Source>
__device__ __forceinline__ void attend(
    Softmax<D, 2>& state, const Source& source, Piece piece, int dim, float scale2, bool chunks) {
    bf16* queries = (bf16*)attention_shared;
    bf16* stages = queries + QUERY_TILE * D;
    int row = threadIdx.x / 32 * 32, place = piece.place + row;
    bool active = row < piece.to && row + 32 > piece.from;
    int keys = piece.place + piece.to, tiles = (keys + KEY_TILE - 1) / KEY_TILE;
    auto load = [&](int tile) {
        bf16* stage = stages + tile % 2 * (2 * KEY_TILE * D);
        load_keys<D, KEY_TILE, QUERY_THREADS>(
            stage, stage + KEY_TILE * D, source, tile * KEY_TILE, keys, dim, chunks);
        copy_commit();
    };
    state.clear();
    load(0);
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) load(tile + 1);
        int first = tile * KEY_TILE;
        if (!active || first > place + 31) continue;
        const bf16* k = stages + tile % 2 * (2 * KEY_TILE * D);
        float s[2][KEY_TILE / 8][4];
        inner_products<D>(s, queries + row * D, k);
        if (first + KEY_TILE - 1 > place) hide_future(s, place, first);
        state.weigh(s, scale2);
        u32 weights[2][KEY_TILE / 16][4];
        pack_left(weights, s);
        add_weighted<D>(state.o, weights, k + KEY_TILE * D);
    }
    __syncthreads();
}

/// Writes the piece's rows: `o` points to this head of the tile's first row, `lse` (absent: 0)
/// likewise, `q_heads` values apart.
template <int D>
__device__ __forceinline__ void store_piece(
    bf16* o, float* lse, Softmax<D, 2>& state, Piece piece, int q_heads, int dim, float scale2) {
    constexpr float LN_2 = 0.6931471805599453f;
    bool pairs = by_pairs(o);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = row_sum(state.total[m][half]);
            int row = threadIdx.x / 32 * 32 + m * 16 + part_row(2 * half);
            if (row < piece.from || row >= piece.to) continue;
            bf16* to = o + (long long)row * q_heads * dim;
            store_row(to, state.o[m], half, 1.0f / total, dim, pairs);
            if (lse && threadIdx.x % 4 == 0)
                lse[(long long)row * q_heads] =
                    state.largest[m][half] * scale2 * LN_2 + logf(total);
        }
}
