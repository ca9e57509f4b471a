// Attention of single rows over the paged cache, split over the keys (Flash-Decoding, Dao et al.
// 2023). The query heads that share a key/value head are the rows of one tile, so that the cache
// is read once; each warp streams keys of its own, and what the warps and splits found is added in
// a fixed order.

constexpr int DECODE_WARPS = 4, DECODE_THREADS = 32 * DECODE_WARPS;
/// Rows of the tile of query heads.
constexpr int HEADS = 16;
/// Keys of a warp's stage, keys of all warps' stages, stages of a warp.
constexpr int WARP_KEYS = 16, STEP_KEYS = WARP_KEYS * DECODE_WARPS, STAGES = 3;

/// Elements of a warp's stages: keys and values each.
template <int D>
constexpr int WARP_ELEMENTS = STAGES * 2 * WARP_KEYS * D;
/// The query heads, then the warps' stages.
template <int D>
constexpr int DECODE_SHARED = (HEADS * D + DECODE_WARPS * WARP_ELEMENTS<D>) * 2;

/// Largest score, and sum of weights relative to it, of a part of the keys.
struct alignas(8) PartSums {
    float largest, total;
};

/// Sizes and tensors of decode. `part_sums (slots, Q, splits)` and `parts (slots, Q, splits, D)`
/// hold what the splits found where there are several. A slot is a sequence, or a batch row where
/// sequences of several rows are decoded as well (`longer`).
struct Decode {
    bf16* o;
    PartSums* part_sums;
    float* parts;
    const bf16 *qkv, *k, *v;
    const int *sequences, *blocks;
    int block_size, q_heads, kv_heads, dim, longer;
    float scale;
};

/// Factor that brings a part to the scores' common largest; 0 for a part without keys.
__device__ __forceinline__ float part_factor(PartSums part, float largest, float scale2) {
    return part.total == 0.0f ? 0.0f : power2((part.largest - largest) * scale2);
}

/// Starts to load 16 keys and values; `row` is the cache row of key `lane % 16`, −1: none.
template <int D>
__device__ __forceinline__ void load_warp_keys(
    bf16* k, const PagedKeys& source, int row, int dim, bool chunks) {
    constexpr int ACROSS = D / 8;
    bf16* v = k + WARP_KEYS * D;
    int lane = threadIdx.x % 32;
    if (chunks) {
#pragma unroll
        for (int i = 0; i < WARP_KEYS * ACROSS / 32; ++i) {
            int key = (i * 32 + lane) / ACROSS, chunk = (i * 32 + lane) % ACROSS;
            int cached = __shfl_sync(~0u, row, key);
            bool valid = cached >= 0 && chunk * 8 < dim;
            long long from = valid ? (long long)cached * source.stride + chunk * 8 : 0;
            copy_async(k + tile_at<D>(key, chunk), source.keys + from, valid);
            copy_async(v + tile_at<D>(key, chunk), source.values + from, valid);
        }
        return;
    }
    for (int i = lane; i < WARP_KEYS * D; i += 32) {
        int key = i / D, column = i % D, to = tile_at<D>(key, column / 8) + column % 8;
        int cached = __shfl_sync(~0u, row, key);
        bool valid = cached >= 0 && column < dim;
        long long from = valid ? (long long)cached * source.stride + column : 0;
        k[to] = valid ? source.keys[from] : bf16{0};
        v[to] = valid ? source.values[from] : bf16{0};
    }
}

/// A warp's keys of `begin .. end`: 16 of every 64. The query heads' tile is on its way.
template <int D>
__device__ __forceinline__ void stream_keys(
    Softmax<D, 1>& state, const bf16* heads, const PagedKeys& source, bf16* stages, int begin,
    int end, int dim, float scale2, bool chunks) {
    constexpr int STAGE = 2 * WARP_KEYS * D;
    int own = begin + threadIdx.x / 32 * WARP_KEYS;
    int steps = (end - begin + STEP_KEYS - 1) / STEP_KEYS;
    auto lookup = [&](int step) {
        int key = own + step * STEP_KEYS + threadIdx.x % WARP_KEYS;
        return key < end ? source.row(key) : -1;
    };
    auto load = [&](int step, int row) {
        if (step < steps)
            load_warp_keys<D>(stages + step % STAGES * STAGE, source, row, dim, chunks);
        copy_commit();
    };
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) load(step, lookup(step));
    // Looked up one step ahead: the copies need not wait for the block list.
    int row = lookup(STAGES - 1);
    copy_wait<STAGES - 1>();
    __syncthreads();
    u32 queries[D / 16][1][4];
    int of_heads = left_offset<D>();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) ldmatrix(queries[i][0], heads + (of_heads ^ (i << 4)));
    state.clear();
    for (int step = 0; step < steps; ++step) {
        copy_wait<STAGES - 2>();
        // Also: all lanes are done with the stage that is filled next.
        __syncwarp();
        load(step + STAGES - 1, row);
        row = lookup(step + STAGES);
        int first = own + step * STEP_KEYS;
        if (first >= end) continue;
        const bf16* k = stages + step % STAGES * STAGE;
        float s[1][2][4] = {};
        int offset = right_offset<D>();
#pragma unroll
        for (int i = 0; i < D / 16; ++i) inner_step<D>(s, queries[i], k + (offset ^ (i << 4)));
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (first + n * 8 + part_column(e) >= end) s[0][n][e] = -infinity();
        state.weigh(s, scale2);
        u32 weights[1][1][4];
        pack_left(weights, s);
        add_weighted<D>(state.o, weights, k + WARP_KEYS * D);
    }
    copy_wait<0>();
    __syncwarp();
}

/// Leaves a warp's sums and values in its stages, which it no longer needs.
template <int D>
__device__ __forceinline__ void leave_part(Softmax<D, 1>& state, bf16* stages) {
    float* values = (float*)stages;
    PartSums* sums = (PartSums*)(values + HEADS * D);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int head = part_row(2 * half);
        float total = row_sum(state.total[0][half]);
        if (threadIdx.x % 4 == 0) sums[head] = {state.largest[0][half], total};
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
                values[head * D + n * 8 + part_column(e)] = state.o[0][n][2 * half + e];
    }
}

/// Adds the warps' parts of one head, a warp per head: to `o`, or as the split's part.
template <int D>
__device__ __forceinline__ void join_warps(
    const Decode& b, const bf16* stages, int head, long long row_head, long long part) {
    float scale2 = b.scale * LOG2_E, largest = -infinity();
    const float* values[DECODE_WARPS];
    PartSums sums[DECODE_WARPS];
#pragma unroll
    for (int warp = 0; warp < DECODE_WARPS; ++warp) {
        values[warp] = (const float*)(stages + warp * WARP_ELEMENTS<D>);
        sums[warp] = ((const PartSums*)(values[warp] + HEADS * D))[head];
        largest = fmaxf(largest, sums[warp].largest);
    }
    float factors[DECODE_WARPS], total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < DECODE_WARPS; ++warp) {
        factors[warp] = part_factor(sums[warp], largest, scale2);
        total += factors[warp] * sums[warp].total;
    }
    for (int column = threadIdx.x % 32; column < b.dim; column += 32) {
        float x = 0.0f;
#pragma unroll
        for (int warp = 0; warp < DECODE_WARPS; ++warp)
            x += factors[warp] * values[warp][head * D + column];
        if (gridDim.z == 1)
            b.o[row_head * b.dim + column] = to_bf16(x / total);
        else
            b.parts[part * b.dim + column] = x;
    }
    if (gridDim.z > 1 && threadIdx.x % 32 == 0) b.part_sums[part] = {largest, total};
}

/// One split of the keys of one batch row, for up to 16 query heads from `head` that share a
/// key/value head.
template <int D>
__device__ __forceinline__ void decode_row(
    const Decode& b, const PagedKeys& source, int slot, int row, int keys, int head, int heads) {
    int warp = threadIdx.x / 32, splits = gridDim.z, split = blockIdx.z;
    int share = ((keys + STEP_KEYS - 1) / STEP_KEYS + splits - 1) / splits * STEP_KEYS;
    int begin = split * share, end = min(keys, begin + share);
    long long part = ((long long)slot * b.q_heads + head) * splits + split;
    if (begin >= end) {
        if (threadIdx.x < heads)
            b.part_sums[part + threadIdx.x * splits] = {-infinity(), 0.0f};
        return;
    }
    bf16 *tile = (bf16*)attention_shared, *stages = tile + HEADS * D;
    int stride = (b.q_heads + 2 * b.kv_heads) * b.dim;
    Rows rows = {b.qkv + (long long)row * stride + head * b.dim, b.dim};
    load_rows<D, HEADS, DECODE_THREADS>(
        tile, rows, 0, heads, b.dim, by_chunks(b.qkv, b.dim), threadIdx.x);
    copy_commit();
    Softmax<D, 1> state;
    bf16* own = stages + warp * WARP_ELEMENTS<D>;
    bool chunks = by_chunks(b.k, b.dim) && by_chunks(b.v, b.dim);
    stream_keys<D>(state, tile, source, own, begin, end, b.dim, b.scale * LOG2_E, chunks);
    leave_part<D>(state, own);
    __syncthreads();
    for (int i = warp; i < heads; i += DECODE_WARPS)
        join_warps<D>(b, stages, i, (long long)row * b.q_heads + head + i, part + i * splits);
    __syncthreads();
}

/// One sequence, where it has one row (or more, where those are wanted as well).
template <int D>
__device__ __forceinline__ void decode(const Decode& b) {
    int group = b.q_heads / b.kv_heads, tiles = (group + HEADS - 1) / HEADS;
    int kv_head = blockIdx.x / tiles, tile = blockIdx.x % tiles * HEADS;
    const int* entry = b.sequences + blockIdx.y * SEQUENCE_WIDTH;
    int rows = entry[SEQUENCE_ROWS], column = kv_head * b.dim;
    if (rows > 1 && !b.longer) return;
    PagedKeys source = {b.k + column, b.v + column, b.blocks + entry[SEQUENCE_BLOCKS],
                        b.block_size, b.kv_heads * b.dim};
    for (int i = 0; i < rows; ++i) {
        int row = entry[SEQUENCE_ROW] + i, slot = b.longer ? row : blockIdx.y;
        int keys = entry[SEQUENCE_POSITION] + i + 1;
        decode_row<D>(b, source, slot, row, keys, kv_head * group + tile,
                      min(group - tile, HEADS));
    }
}

/// `o (N, Q·D)` of the rows of sequences with one row, where the grid has one split, else their
/// parts. Grid (K · ⌈Q / K / 16⌉, sequences, splits ≤ 32), 128 threads.
#define ATTENTION_DECODE(D, NAME)                                                               \
    extern "C" __global__ void __launch_bounds__(DECODE_THREADS, 2)                             \
        NAME(bf16* o, PartSums* part_sums, float* parts, const bf16* qkv, const bf16* k,        \
             const bf16* v, const int* sequences, const int* blocks, int block_size,            \
             int q_heads, int kv_heads, int dim, int longer, float scale) {                     \
        decode<D>({o, part_sums, parts, qkv, k, v, sequences, blocks, block_size, q_heads,      \
                   kv_heads, dim, longer, scale});                                              \
    }

ATTENTION_DECODE(64, attention_decode_64)
ATTENTION_DECODE(128, attention_decode_128)

/// Adds the splits' parts in their order: `o (N, Q·D)`. A warp per head.
/// Grid (⌈Q / 4⌉, sequences), 128 threads.
extern "C" __global__ void __launch_bounds__(128) attention_combine(
    bf16* o, const PartSums* part_sums, const float* parts, const int* sequences, int splits,
    int q_heads, int dim, int longer, float scale) {
    int head = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int* entry = sequences + blockIdx.y * SEQUENCE_WIDTH;
    int rows = entry[SEQUENCE_ROWS];
    if (head >= q_heads || (rows > 1 && !longer)) return;
    for (int i = 0; i < rows; ++i) {
        int row = entry[SEQUENCE_ROW] + i;
        long long part = ((long long)(longer ? row : blockIdx.y) * q_heads + head) * splits;
        PartSums own = {-infinity(), 0.0f};
        if (lane < splits) own = part_sums[part + lane];
        float factor = part_factor(own, warp_max(own.largest), scale * LOG2_E);
        float total = warp_sum(factor * own.total), x[4] = {};
        for (int split = 0; split < splits; ++split) {
            float weight = __shfl_sync(~0u, factor, split);
            // A split without keys has left no values.
            if (weight == 0.0f) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j * 32 + lane < dim)
                    x[j] += weight * parts[(part + split) * dim + j * 32 + lane];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (j * 32 + lane < dim)
                o[((long long)row * q_heads + head) * dim + j * 32 + lane] =
                    to_bf16(x[j] / total);
    }
}
