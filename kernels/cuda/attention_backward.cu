// Backward of causal attention of training rows: FlashAttention-2 (Dao 2023) without atomics. Two
// kernels recompute the weights from `lse`: one owns keys and sums over queries, the other owns
// queries and sums over keys.
//
// With P the weights, Δ[i] = Σ d_o[i]·o[i]: dV = Pᵀ·d_o, dS = P ∘ (d_o·Vᵀ − Δ),
// dQ = scale · dS·K, dK = scale · dSᵀ·Q.

/// What both kernels read of a query row and head: log₂ of the sum of exponents, and Δ.
struct alignas(8) RowSums {
    float lse2, delta;
};

/// Sizes and tensors of backward.
struct Backward {
    bf16* d_qkv;
    const bf16 *d_o, *qkv;
    const RowSums* sums;  // (Q, rows)
    const int* examples;
    int rows, q_heads, kv_heads, dim;
    float scale;
    __device__ __forceinline__ int stride() const { return (q_heads + 2 * kv_heads) * dim; }
};

/// `sums (Q, rows)` from `d_o`, `o (rows, Q·D)` and `lse (rows, Q)`. A warp per row and head.
/// Grid ⌈rows · Q / 8⌉, 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_sums(
    RowSums* sums, const bf16* d_o, const bf16* o, const float* lse, int rows, int q_heads,
    int dim) {
    long long place = blockIdx.x * 8ll + threadIdx.x / 32;
    if (place >= (long long)rows * q_heads) return;
    int row = place / q_heads, head = place % q_heads, lane = threadIdx.x % 32;
    const bf16 *left = d_o + place * dim, *right = o + place * dim;
    float sum = 0.0f;
    if (by_pairs(left) && by_pairs(right)) {
        for (int i = 2 * lane; i < dim; i += 64) {
            u32 a = *(const u32*)(left + i), b = *(const u32*)(right + i);
            sum = fmaf(low_half(a), low_half(b), sum);
            sum = fmaf(high_half(a), high_half(b), sum);
        }
    } else {
        for (int i = 2 * lane; i < dim; i += 64) {
            sum = fmaf(to_float(left[i]), to_float(right[i]), sum);
            sum = fmaf(to_float(left[i + 1]), to_float(right[i + 1]), sum);
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[(long long)head * rows + row] = {lse[place] * LOG2_E, sum};
}

// ---- gradients of keys and values: tiles of 128 keys, steps of 64 queries -----------------------

constexpr int OWNED_KEYS = 128, STEP_QUERIES = 64, KEYS_THREADS = 256;

/// Keys and values, then two stages of queries, d_o and row sums.
template <int D>
constexpr int KEYS_SHARED = 2 * (OWNED_KEYS + 2 * STEP_QUERIES) * D * 2 + 2 * STEP_QUERIES * 8;

/// The stages of queries in shared memory.
template <int D>
struct QueryStage {
    bf16 *q, *d_o;
    RowSums* sums;
    __device__ __forceinline__ explicit QueryStage(int stage) {
        bf16* stages = (bf16*)attention_shared + 2 * OWNED_KEYS * D;
        q = stages + stage * (2 * STEP_QUERIES * D);
        d_o = q + STEP_QUERIES * D;
        sums = (RowSums*)(stages + 4 * STEP_QUERIES * D) + stage * STEP_QUERIES;
    }
};

/// Starts to load queries `first ..` of one head of the example that starts at row `start` and has
/// `queries` rows.
template <int D>
__device__ __forceinline__ void load_queries(
    const QueryStage<D>& to, const Backward& b, int head, int start, int first, int queries,
    bool chunks) {
    int thread = threadIdx.x, width = b.q_heads * b.dim, column = head * b.dim;
    Rows q = {b.qkv + (long long)start * b.stride() + column, b.stride()};
    Rows d_o = {b.d_o + (long long)start * width + column, width};
    load_rows<D, STEP_QUERIES, KEYS_THREADS>(to.q, q, first, queries, b.dim, chunks, thread);
    load_rows<D, STEP_QUERIES, KEYS_THREADS>(to.d_o, d_o, first, queries, b.dim, chunks, thread);
    if (thread < STEP_QUERIES) {
        bool valid = first + thread < queries;
        long long at = (long long)head * b.rows + start + (valid ? first + thread : 0);
        copy_pair(to.sums + thread, b.sums + at, valid);
    }
    copy_commit();
}

/// Adds what queries `first ..` give to the gradients of a warp's 16 keys from position `key`:
/// `keys` and `values` are their rows, `queries` is where the example ends.
template <int D>
__device__ __forceinline__ void add_queries(
    float (&dk)[1][D / 8][4], float (&dv)[1][D / 8][4], const bf16* keys, const bf16* values,
    const QueryStage<D>& stage, int key, int first, int queries, float scale2) {
    constexpr int PARTS = STEP_QUERIES / 8;
    bool partly = first < key + 15 || first + STEP_QUERIES > queries;
    float p[1][PARTS][4], ds[1][PARTS][4];
    u32 packed[1][PARTS / 2][4];
    inner_products<D>(p, keys, stage.q);
#pragma unroll
    for (int n = 0; n < PARTS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            int column = n * 8 + part_column(e), query = first + column;
            p[0][n][e] = power2(fmaf(p[0][n][e], scale2, -stage.sums[column].lse2));
            if (partly && (query < key + part_row(e) || query >= queries)) p[0][n][e] = 0.0f;
        }
    pack_left(packed, p);
    add_weighted<D>(dv, packed, stage.d_o);
    inner_products<D>(ds, values, stage.d_o);
#pragma unroll
    for (int n = 0; n < PARTS; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            float delta = stage.sums[n * 8 + part_column(e)].delta;
            ds[0][n][e] = p[0][n][e] * (ds[0][n][e] - delta);
        }
    pack_left(packed, ds);
    add_weighted<D>(dk, packed, stage.q);
}

/// First row from `row` on that is not of the example that starts at row `start`.
__device__ __forceinline__ int example_end(const int* examples, int row, int rows, int start) {
    int end = rows;
    while (row < end) {
        int middle = (row + end) / 2;
        if (examples[middle] == start)
            row = middle + 1;
        else
            end = middle;
    }
    return end;
}

/// Gradients of the keys and values of a piece of a tile, over all query heads of the group and
/// all queries from the piece's first row to the example's end.
template <int D>
__device__ __forceinline__ void piece_keys(
    const Backward& b, Piece piece, int tile, int end, int kv_head, bool chunks) {
    bf16* keys = (bf16*)attention_shared + threadIdx.x / 32 * 16 * D;
    int row = threadIdx.x / 32 * 16, place = piece.place + row;
    bool active = row < piece.to && row + 16 > piece.from;
    int start = tile - piece.place, queries = end - start, group = b.q_heads / b.kv_heads;
    int skip = (piece.place + piece.from) / STEP_QUERIES;
    int across = (queries + STEP_QUERIES - 1) / STEP_QUERIES - skip, steps = across * group;
    float dk[1][D / 8][4], dv[1][D / 8][4];
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) dk[0][n][e] = dv[0][n][e] = 0.0f;
    auto load = [&](int step) {
        int head = kv_head * group + step / across, first = (skip + step % across) * STEP_QUERIES;
        load_queries<D>(QueryStage<D>(step % 2), b, head, start, first, queries, chunks);
    };
    load(0);
    for (int step = 0; step < steps; ++step) {
        copy_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        int first = (skip + step % across) * STEP_QUERIES;
        if (!active || first + STEP_QUERIES <= place) continue;
        add_queries<D>(dk, dv, keys, keys + OWNED_KEYS * D, QueryStage<D>(step % 2), place, first,
                       queries, b.scale * LOG2_E);
    }
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int at = row + part_row(2 * half);
        if (at < piece.from || at >= piece.to) continue;
        bf16* to = b.d_qkv + (long long)(tile + at) * b.stride();
        bf16 *to_key = to + (b.q_heads + kv_head) * b.dim, *to_value = to_key + b.kv_heads * b.dim;
        store_row(to_key, dk[0], half, b.scale, b.dim, by_pairs(b.d_qkv));
        store_row(to_value, dv[0], half, 1.0f, b.dim, by_pairs(b.d_qkv));
    }
}

/// One tile of keys of one key/value head, example by example.
template <int D>
__device__ __forceinline__ void backward_keys(const Backward& b) {
    // Earlier keys are seen by more queries: blocks go in row order.
    int tile = blockIdx.y * OWNED_KEYS, kv_head = blockIdx.x, thread = threadIdx.x;
    int count = min(b.rows - tile, OWNED_KEYS), stride = b.stride();
    bool chunks = by_chunks(b.qkv, b.dim) && by_chunks(b.d_o, b.dim);
    const bf16* keys = b.qkv + (long long)tile * stride + (b.q_heads + kv_head) * b.dim;
    ArenaKeys source = {keys, keys + b.kv_heads * b.dim, stride};
    bf16* tiles = (bf16*)attention_shared;
    load_keys<D, OWNED_KEYS, KEYS_THREADS>(
        tiles, tiles + OWNED_KEYS * D, source, 0, count, b.dim, chunks);
    int example = thread < count ? b.examples[tile + thread] : -1;
    Piece piece = {0, 0, 0};
    while (piece.to < count) {
        int start = b.examples[tile + piece.to];
        piece.from = piece.to;
        piece.to += __syncthreads_count(thread >= piece.from && example == start);
        piece.place = tile - start;
        int end = example_end(b.examples, tile + piece.to, b.rows, start);
        piece_keys<D>(b, piece, tile, end, kv_head, chunks);
    }
}

// ---- gradients of queries: tiles of 128 queries, steps of 32 keys -------------------------------

constexpr int STEP_KEYS = 32;

/// Queries and d_o, then two stages of keys and values.
template <int D>
constexpr int QUERIES_SHARED = 2 * (QUERY_TILE + 2 * STEP_KEYS) * D * 2;

/// Adds what keys `first ..` give to the gradients of a warp's 32 queries from position `place`.
template <int D>
__device__ __forceinline__ void add_keys(
    float (&dq)[2][D / 8][4], const float (&lse2)[2][2], const float (&delta)[2][2],
    const bf16* queries, const bf16* d_o, const bf16* keys, int place, int first, float scale2) {
    float p[2][STEP_KEYS / 8][4], ds[2][STEP_KEYS / 8][4];
    inner_products<D>(p, queries, keys);
    inner_products<D>(ds, d_o, keys + STEP_KEYS * D);
    bool partly = first + STEP_KEYS - 1 > place;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < STEP_KEYS / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float weight = power2(fmaf(p[m][n][e], scale2, -lse2[m][e / 2]));
                ds[m][n][e] = weight * (ds[m][n][e] - delta[m][e / 2]);
                bool future = first + n * 8 + part_column(e) > place + m * 16 + part_row(e);
                if (partly && future) ds[m][n][e] = 0.0f;
            }
    u32 packed[2][STEP_KEYS / 16][4];
    pack_left(packed, ds);
    add_weighted<D>(dq, packed, keys);
}

/// Gradients of a piece's queries over the keys `0 ..=` its last row's position.
template <int D>
__device__ __forceinline__ void piece_queries(
    const Backward& b, Piece piece, int tile, int head, bool chunks) {
    bf16* queries = (bf16*)attention_shared;
    bf16* stages = queries + 2 * QUERY_TILE * D;
    int row = threadIdx.x / 32 * 32, place = piece.place + row;
    bool active = row < piece.to && row + 32 > piece.from;
    int end = piece.place + piece.to, steps = (end + STEP_KEYS - 1) / STEP_KEYS;
    const bf16* keys = b.qkv + (long long)(tile - piece.place) * b.stride() +
                       (b.q_heads + head / (b.q_heads / b.kv_heads)) * b.dim;
    ArenaKeys source = {keys, keys + b.kv_heads * b.dim, b.stride()};
    auto load = [&](int step) {
        bf16* stage = stages + step % 2 * (2 * STEP_KEYS * D);
        load_keys<D, STEP_KEYS, QUERY_THREADS>(
            stage, stage + STEP_KEYS * D, source, step * STEP_KEYS, end, b.dim, chunks);
        copy_commit();
    };
    load(0);
    float dq[2][D / 8][4], lse2[2][2], delta[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int at = min(tile + row + m * 16 + part_row(2 * half), b.rows - 1);
            RowSums sums = b.sums[(long long)head * b.rows + at];
            lse2[m][half] = sums.lse2;
            delta[m][half] = sums.delta;
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dq[m][n][e] = 0.0f;
    }
    for (int step = 0; step < steps; ++step) {
        copy_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        int first = step * STEP_KEYS;
        if (!active || first > place + 31) continue;
        add_keys<D>(dq, lse2, delta, queries + row * D, queries + (QUERY_TILE + row) * D,
                    stages + step % 2 * (2 * STEP_KEYS * D), place, first, b.scale * LOG2_E);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int at = row + m * 16 + part_row(2 * half);
            if (at < piece.from || at >= piece.to) continue;
            bf16* to = b.d_qkv + (long long)(tile + at) * b.stride() + head * b.dim;
            store_row(to, dq[m], half, b.scale, b.dim, by_pairs(b.d_qkv));
        }
}

/// One tile of queries of one query head, example by example.
template <int D>
__device__ __forceinline__ void backward_queries(const Backward& b) {
    // Later queries see more keys: they start first.
    int tile = (gridDim.y - 1 - blockIdx.y) * QUERY_TILE, head = blockIdx.x, thread = threadIdx.x;
    int count = min(b.rows - tile, QUERY_TILE), width = b.q_heads * b.dim;
    bool chunks = by_chunks(b.qkv, b.dim) && by_chunks(b.d_o, b.dim);
    Rows q = {b.qkv + (long long)tile * b.stride() + head * b.dim, b.stride()};
    Rows d_o = {b.d_o + (long long)tile * width + head * b.dim, width};
    bf16* tiles = (bf16*)attention_shared;
    load_rows<D, QUERY_TILE, QUERY_THREADS>(tiles, q, 0, count, b.dim, chunks, thread);
    load_rows<D, QUERY_TILE, QUERY_THREADS>(
        tiles + QUERY_TILE * D, d_o, 0, count, b.dim, chunks, thread);
    int example = thread < count ? b.examples[tile + thread] : -1;
    Piece piece = {0, 0, 0};
    while (piece.to < count) {
        int start = b.examples[tile + piece.to];
        piece.from = piece.to;
        piece.to += __syncthreads_count(thread >= piece.from && example == start);
        piece.place = tile - start;
        piece_queries<D>(b, piece, tile, head, chunks);
    }
}

/// `d_qkv (rows, (Q+2K)·D)`: the key and value columns (`_keys`, grid (K, ⌈rows / 128⌉), 256
/// threads) or the query columns (`_queries`, grid (Q, ⌈rows / 128⌉), 128 threads). `sums` as
/// attention_backward_sums leaves them; `scale` = 1 / sqrt(dim).
#define ATTENTION_BACKWARD(NAME, FUNCTION, THREADS, BLOCKS)                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                               \
        NAME(bf16* d_qkv, const bf16* d_o, const bf16* qkv, const RowSums* sums,                \
             const int* examples, int rows, int q_heads, int kv_heads, int dim, float scale) {  \
        FUNCTION({d_qkv, d_o, qkv, sums, examples, rows, q_heads, kv_heads, dim, scale});       \
    }

ATTENTION_BACKWARD(attention_backward_keys_64, backward_keys<64>, KEYS_THREADS, 1)
ATTENTION_BACKWARD(attention_backward_keys_128, backward_keys<128>, KEYS_THREADS, 1)
ATTENTION_BACKWARD(attention_backward_queries_64, backward_queries<64>, QUERY_THREADS, 2)
ATTENTION_BACKWARD(attention_backward_queries_128, backward_queries<128>, QUERY_THREADS, 2)
