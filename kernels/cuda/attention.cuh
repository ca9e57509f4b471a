// What the attention kernels share: tiles of rows in shared memory, products of tiles on tensor
// cores, and the online softmax of FlashAttention-2 (Dao 2023). Compiled between common.cuh and
// the attention_*.cu files.
//
// Scores, weights and their gradients never leave registers: what one product leaves in the
// accumulator layout of mma is packed to the layout of its left operand and goes into the next.
//
// Rows of an arena or batch are worked on in pieces: the rows of one tile that belong to one
// example or sequence. A piece starts from nothing and alone writes its rows, and its tiles of
// keys (or of queries) are counted from the example's start. So neither bits nor infinities
// depend on which neighbours share the tile.
//
// D is the head dim of the tile, 64 or 128; `dim` ≤ D is the real one, columns beyond it are zero.

constexpr float LOG2_E = 1.4426950408889634f;

extern __shared__ __align__(128) unsigned char attention_shared[];

/// 2^x to 2 units in the last place; 2^-∞ is 0.
__device__ __forceinline__ float power2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Rows of a tile of queries, and threads of a block that owns one: a warp per 32 rows.
constexpr int QUERY_TILE = 128, QUERY_THREADS = 128;

/// Rows `from .. to` of a tile that belong to one example; row `i` of the tile stands at position
/// `place + i` of it (negative before it starts).
struct Piece {
    int place, from, to;
};

// ---- tiles --------------------------------------------------------------------------------------

/// Where chunk `chunk` (8 values) of row `row` lies in a tile of rows of D. The same chunk of 8
/// rows in a run lies in 8 different groups of banks, as ldmatrix reads them.
template <int D>
__device__ __forceinline__ int tile_at(int row, int chunk) {
    return row * D + ((chunk ^ (row & 7)) << 3);
}

/// Whether rows of width `dim` at a multiple of `dim` from `pointer` may be copied by 16 bytes.
__device__ __forceinline__ bool by_chunks(const bf16* pointer, int dim) {
    return aligned16(pointer) && dim % 8 == 0;
}

/// Rows at equal distances.
struct Rows {
    const bf16* base;
    int stride;
    __device__ __forceinline__ const bf16* operator()(int row) const {
        return base + (long long)row * stride;
    }
};

/// Fills a tile with rows `first ..` of `rows`, zeros from row `end` and column `dim` on. Called
/// by THREADS threads, of which this is number `thread`. Where `chunks` holds the copies are
/// asynchronous.
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load_rows(
    bf16* tile, const Rows& rows, int first, int end, int dim, bool chunks, int thread) {
    constexpr int ACROSS = D / 8;
    // As [left_offset]: addresses are cheaper to find again than to keep.
    asm volatile("" : "+r"(thread));
    if (chunks) {
#pragma unroll
        for (int i = 0; i < ROWS * ACROSS / THREADS; ++i) {
            int row = (i * THREADS + thread) / ACROSS, chunk = (i * THREADS + thread) % ACROSS;
            bool valid = first + row < end && chunk * 8 < dim;
            const bf16* from = valid ? rows(first + row) + chunk * 8 : rows.base;
            copy_async(tile + tile_at<D>(row, chunk), from, valid);
        }
        return;
    }
    for (int index = thread; index < ROWS * D; index += THREADS) {
        int row = index / D, column = index % D;
        bf16 value = {0};
        if (first + row < end && column < dim) value = rows(first + row)[column];
        tile[tile_at<D>(row, column / 8) + column % 8] = value;
    }
}

/// Starts a copy of 8 bytes, zeros where `valid` is false.
__device__ __forceinline__ void copy_pair(void* to, const void* from, bool valid) {
    int bytes = valid ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}

/// Keys and values of one head of an example in the arena: key `j` is row `j` of both.
struct ArenaKeys {
    const bf16 *keys, *values;
    int stride;
    __device__ __forceinline__ long long operator()(int key) const {
        return (long long)key * stride;
    }
};

/// Keys and values of one head of a sequence in the paged cache.
struct PagedKeys {
    const bf16 *keys, *values;
    const int* blocks;
    int block_size, stride;
    __device__ __forceinline__ int row(int key) const {
        int block = key / block_size;
        return blocks[block] * block_size + (key - block * block_size);
    }
    __device__ __forceinline__ long long operator()(int key) const {
        return (long long)row(key) * stride;
    }
};

/// Fills two tiles with keys `first ..` and their values, as [load_rows].
template <int D, int ROWS, int THREADS, class Source>
__device__ __forceinline__ void load_keys(
    bf16* k, bf16* v, const Source& source, int first, int end, int dim, bool chunks) {
    constexpr int ACROSS = D / 8;
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    if (chunks) {
#pragma unroll
        for (int i = 0; i < ROWS * ACROSS / THREADS; ++i) {
            int row = (i * THREADS + thread) / ACROSS, chunk = (i * THREADS + thread) % ACROSS;
            bool valid = first + row < end && chunk * 8 < dim;
            long long from = valid ? source(first + row) + chunk * 8 : 0;
            int to = tile_at<D>(row, chunk);
            copy_async(k + to, source.keys + from, valid);
            copy_async(v + to, source.values + from, valid);
        }
        return;
    }
    for (int index = thread; index < ROWS * D; index += THREADS) {
        int row = index / D, column = index % D;
        bf16 key = {0}, value = {0};
        if (first + row < end && column < dim) {
            long long from = source(first + row) + column;
            key = source.keys[from];
            value = source.values[from];
        }
        int to = tile_at<D>(row, column / 8) + column % 8;
        k[to] = key;
        v[to] = value;
    }
}

// ---- products of tiles: a warp's 16·M rows ------------------------------------------------------

/// Where this lane's address for ldmatrix lies in 16 rows of a tile, first two chunks: as a left
/// operand (also transposed as a right one), or as two right operands of 8 rows. Those of the
/// chunks `2 · step` and next are this with `step << 4` flipped. The value is hidden from the
/// compiler, which would else keep all the flipped ones in registers through the loops.
template <int D>
__device__ __forceinline__ int left_offset() {
    int lane = threadIdx.x % 32, offset = tile_at<D>(lane % 16, lane / 16);
    asm volatile("" : "+r"(offset));
    return offset;
}
template <int D>
__device__ __forceinline__ int right_offset() {
    int lane = threadIdx.x % 32;
    int offset = tile_at<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    asm volatile("" : "+r"(offset));
    return offset;
}

/// Adds one step of 16 columns to the inner products of 16·M left rows and the 8·N rows of `tile`,
/// which is at this lane's place of the step.
template <int D, int M, int N>
__device__ __forceinline__ void inner_step(
    float (&c)[M][N][4], const u32 (&a)[M][4], const bf16* tile) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 b[4];
        ldmatrix(b, tile + n * 8 * D);
        u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < M; ++m) {
            mma(c[m][n], a[m], low);
            mma(c[m][n + 1], a[m], high);
        }
    }
}

/// `c` = inner products of the first 16·M rows of `left` with the 8·N rows of `right`.
template <int D, int M, int N>
__device__ __forceinline__ void inner_products(
    float (&c)[M][N][4], const bf16* left, const bf16* right) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f;
    int of_left = left_offset<D>(), of_right = right_offset<D>();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix(a[m], left + m * 16 * D + (of_left ^ (step << 4)));
        inner_step<D>(c, a, right + (of_right ^ (step << 4)));
    }
}

/// An accumulator rounded to bf16 as a left operand: two of its 8-column parts per 16 columns.
template <int M, int N>
__device__ __forceinline__ void pack_left(u32 (&w)[M][N / 2][4], const float (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n) {
            w[m][n / 2][n % 2 * 2] = pack(c[m][n][0], c[m][n][1]);
            w[m][n / 2][n % 2 * 2 + 1] = pack(c[m][n][2], c[m][n][3]);
        }
}

/// `c += w · tile`: w 16·M × 16·STEPS, a tile of 16·STEPS rows.
template <int D, int M, int STEPS>
__device__ __forceinline__ void add_weighted(
    float (&c)[M][D / 8][4], const u32 (&w)[M][STEPS][4], const bf16* tile) {
    int offset = left_offset<D>();
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 b[4];
            ldmatrix_transposed(b, tile + step * 16 * D + (offset ^ (n << 3)));
            u32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(c[m][n], w[m][step], low);
                mma(c[m][n + 1], w[m][step], high);
            }
        }
}

/// Row (of 16) and column (of 8) of element `e` of this lane's part of an accumulator.
__device__ __forceinline__ int part_row(int e) { return threadIdx.x % 32 / 4 + e / 2 * 8; }
__device__ __forceinline__ int part_column(int e) { return threadIdx.x % 4 * 2 + e % 2; }

/// Sum over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/// Writes this lane's part of a row of an accumulator, times `factor`. `half` 0: row lane / 4, 1:
/// that + 8; `to` is that row's first element, `pairs` whether it may be written by 4 bytes.
template <int PARTS>
__device__ __forceinline__ void store_row(
    bf16* to, const float (&c)[PARTS][4], int half, float factor, int dim, bool pairs) {
#pragma unroll
    for (int n = 0; n < PARTS; ++n) {
        int column = n * 8 + part_column(0);
        float low = c[n][2 * half] * factor, high = c[n][2 * half + 1] * factor;
        // The head dim is even: a pair is inside it or outside.
        if (column >= dim) continue;
        if (pairs) {
            *(u32*)(to + column) = pack(low, high);
        } else {
            to[column] = to_bf16(low);
            to[column + 1] = to_bf16(high);
        }
    }
}
__device__ __forceinline__ bool by_pairs(const bf16* pointer) { return ((u64)pointer & 3) == 0; }

// ---- online softmax -----------------------------------------------------------------------------

/// Where a warp's 16·M rows stand: the largest score so far, the sum of weights (this lane's part
/// of it), and the weighted sum of values, both relative to the largest score.
template <int D, int M>
struct Softmax {
    float o[M][D / 8][4];
    float largest[M][2], total[M][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < M; ++m) {
            largest[m][0] = largest[m][1] = -infinity();
            total[m][0] = total[m][1] = 0.0f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[m][n][e] = 0.0f;
        }
    }

    /// Turns scores (−∞: not seen) to weights `2^(scale2 · (score − largest))` and brings what was
    /// summed before to the new largest score.
    template <int N>
    __device__ __forceinline__ void weigh(float (&s)[M][N][4], float scale2) {
        bool moved = false;
        float before[M][2];
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float most = largest[m][half];
#pragma unroll
                for (int n = 0; n < N; ++n)
                    most = fmaxf(most, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                most = row_max(most);
                // A row that sees no key yet keeps weights of zero.
                float base = most == -infinity() ? 0.0f : most * scale2, sum = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        s[m][n][e] = power2(fmaf(s[m][n][e], scale2, -base));
                        sum += s[m][n][e];
                    }
                // Exactly 1 where nothing moves: whether others move must not change a bit.
                bool same = most == largest[m][half];
                before[m][half] = same ? 1.0f : power2((largest[m][half] - most) * scale2);
                moved |= !same;
                total[m][half] = fmaf(total[m][half], before[m][half], sum);
                largest[m][half] = most;
            }
        // The largest score settles early; then the factors are 1.
        if (__any_sync(~0u, moved)) rescale(before);
    }

    __device__ __forceinline__ void rescale(const float (&factor)[M][2]) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[m][n][e] *= factor[m][e / 2];
    }
};
