// Segmented multi-LoRA multiplication, backward, rows: `dS = scale · dy B` and
// `dx += drop'(dS A)`. The weights' gradients are in smlm_gradients.cu.

/// Rank tiles that a warp multiplies with the same columns of dy.
constexpr int PASS = 2;

/// One module's part of dy, and B, as a warp reads them.
struct Source {
    RowPair rows;
    const bf16* b;
    int rank;
};

/// Two neighbouring ranks of a row of B. `vector`: ranks are even in number, B is a multiple of 4
/// bytes.
template <bool vector>
__device__ __forceinline__ u32 load_ranks(const bf16* row, int rank, int ranks, bool valid) {
    if constexpr (vector) return load4(row + rank, valid && rank < ranks);
    u32 low = load_bits(row + rank, valid && rank < ranks);
    return low | (load_bits(row + rank + 1, valid && rank + 1 < ranks) << 16);
}

/// Adds the product of one STEP for 16 ranks from `rank`. Ranks are dealt to places so that a lane
/// reads neighbours: place n of c[e] is rank 2n + e.
template <bool vector>
__device__ __forceinline__ void ds_step(
    float (&c)[2][4], const Eight (&dy)[2], const Source& source, int rank, int column,
    int end) {
    int own = rank + threadIdx.x % 32 / 4 * 2;
    const bf16* row = source.b + (long long)column * source.rank;
    u32 b[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
        b[i] = load_ranks<vector>(row + i * source.rank, own, source.rank, column + i < end);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 a[4];
        left_factor(a, dy[0], dy[1], half);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            u32 pairs[2] = {interleave(b[4 * half], b[4 * half + 1], e),
                            interleave(b[4 * half + 2], b[4 * half + 3], e)};
            mma(c[e], a, pairs);
        }
    }
}

/// Sums of one split, `begin .. end` of the module's columns, for PASS rank tiles from `rank`.
template <bool vector>
__device__ __forceinline__ void ds_split(
    float (&sums)[PASS][2][4], const Source& source, int rank, int begin, int end) {
    constexpr int AHEAD = vector ? 4 : 1;
    int lane_column = 8 * (threadIdx.x % 4);
    Eight ahead[AHEAD][2];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
        stream_rows<vector>(ahead[u], source.rows, begin + STEP * u + lane_column, end);
#pragma unroll
    for (int i = 0; i < PASS; ++i) clear(sums[i]);
    for (int chain = begin; chain < end; chain += CHAIN) {
        float partial[PASS][2][4];
#pragma unroll
        for (int i = 0; i < PASS; ++i) clear(partial[i]);
        int chain_end = min(chain + CHAIN, end);
        for (int step = chain; step < chain_end; step += STEP * AHEAD) {
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                int column = step + STEP * u + lane_column;
#pragma unroll
                for (int i = 0; i < PASS; ++i)
                    if (rank + i * TILE < source.rank)
                        ds_step<vector>(
                            partial[i], ahead[u], source, rank + i * TILE, column, end);
                stream_rows<vector>(ahead[u], source.rows, column + STEP * AHEAD, end);
            }
        }
#pragma unroll
        for (int i = 0; i < PASS; ++i) add(sums[i], partial[i]);
    }
}

/// Where a block's sums of one module go: `count` of `planes` planes; the last split's block
/// clears the others.
struct Target {
    float* sums;
    u64 plane;
    int planes, count, module, first;
    float scale;
};

/// Splits `split`, `split + count`, … of 16 rows of a segment by one warp.
template <bool vector>
__device__ __forceinline__ void ds_rows(
    const Target& target, const Source& source, const Group& group, const Segment& segment,
    int split) {
    int lane = threadIdx.x % 32, columns = group.columns[target.module];
    for (; split * SPLIT < columns; split += target.count) {
        bool adds = split >= target.count, last = (split + 1) * SPLIT >= columns;
        float* to = target.sums + split % target.count * target.plane;
        for (int rank = 0; rank < source.rank; rank += PASS * TILE) {
            float sums[PASS][2][4];
            int end = min((split + 1) * SPLIT, columns);
            ds_split<vector>(sums, source, rank, split * SPLIT, end);
#pragma unroll
            for (int e = 0; e < PASS * 8; ++e) {
                int row = target.first + lane / 4 + e % 4 / 2 * 8;
                int j = rank + e / 8 * TILE + lane % 4 * 4 + e % 2 * 2 + e / 4 % 2;
                if (row >= segment.rows || j >= source.rank) continue;
                long long index = s_index(group, segment, row, target.module, source.rank) + j;
                // Rounded as planes of their own would be.
                float sum = __fmul_rn(target.scale, sums[e / 8][e / 4 % 2][e % 4]);
                to[index] = adds ? to[index] + sum : sum;
                for (int plane = target.count; last && plane < target.planes; ++plane)
                    target.sums[plane * target.plane + index] = 0.0f;
            }
        }
    }
}

/// Sums of splits of `scale · dy B`, in `planes` planes laid out as S. Blocks: tiles of 64 rows ×
/// splits of every module's columns; with one plane, × modules, each block looping over the
/// splits. dy `(N, width)`.
extern "C" __global__ void __launch_bounds__(THREADS, 3) smlm_backward_s(
    float* sums, const bf16* dy, u64 plane, int planes, const __grid_constant__ Group group) {
    Rows at = find_rows(group, blockIdx.x, ROWS);
    if (at.segment < 0) return;
    Segment segment = read_segment(group, at.segment);
    int first = at.first + (int)threadIdx.x / 32 * TILE;
    if (first >= segment.rows) return;
    int module = 0, split = blockIdx.y, count;
    while (true) {
        count = planes == 1 ? 1 : ceil_div(group.columns[module], SPLIT);
        if (split < count) break;
        split -= count;
        ++module;
    }
    Lora lora = read_lora(group, segment.slot, module);
    if (!lora.present) return;
    const bf16* start =
        dy + ((long long)(segment.row + first) * group.width + group.column[module]);
    Source source = {row_pair(start, segment.rows - first, group.width), lora.b, lora.rank};
    Target target = {sums, plane, planes, count, module, first, lora.scale};
    bool aligned = aligned16(dy) && group.width % 8 == 0 && group.column[module] % 8 == 0 &&
                   group.columns[module] % 8 == 0 && lora.rank % 2 == 0 &&
                   ((u64)lora.b & 3) == 0;
    if (aligned)
        ds_rows<true>(target, source, group, segment, split);
    else
        ds_rows<false>(target, source, group, segment, split);
}

/// `ds[i] = sum of planes[..][i]`, in order, rounded. Blocks: `plane` elements by THREADS.
extern "C" __global__ void __launch_bounds__(THREADS) smlm_backward_round(
    bf16* ds, const float* sums, u64 plane, int planes) {
    u64 i = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= plane) return;
    float sum = sums[i];
#pragma unroll 4
    for (int split = 1; split < planes; ++split) sum += sums[split * plane + i];
    ds[i] = to_bf16(sum);
}

// ---- dx ----------------------------------------------------------------------------------------

/// All modules of the warp's 16 rows.
struct Terms {
    /// Null where a module is no target.
    const bf16* a[MODULES];
    /// dS of the lane's first row, first module, from the lane's first rank on.
    const bf16* ds;
    int rank;
    /// Whether four ranks of dS can be read at once.
    bool vector;
};

__device__ __forceinline__ Terms read_terms(
    const bf16* ds, const Group& group, const Segment& segment, int first) {
    Terms terms;
#pragma unroll
    for (int m = 0; m < MODULES; ++m) {
        terms.a[m] = nullptr;
        if (m >= group.modules) continue;
        Lora lora = read_lora(group, segment.slot, m);
        if (lora.present) terms.a[m] = lora.a;
    }
    terms.rank = group.slots[(long long)segment.slot * SLOT_WIDTH + SLOT_RANK];
    int row = first + threadIdx.x % 32 / 4;
    const bf16* start = ds + s_index(group, segment, row, 0, terms.rank);
    terms.vector = terms.rank % 4 == 0 && ((u64)start & 7) == 0;
    terms.ds = start + threadIdx.x % 4 * 4;
    return terms;
}

/// Which of the lane's 16 columns are kept, a bit each: eight from `column` on, eight from
/// `column + 32` on.
__device__ __forceinline__ u32 kept_columns(u32 key, int column, u32 limit) {
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i)
        bits |= keeps(key, column + i % 8 + i / 8 * 32, limit) ? 1u << i : 0;
    return bits;
}

/// dS of the lane's two rows, as left factor: four ranks from `rank` on and the lane's place.
__device__ __forceinline__ void load_ds(
    u32 (&to)[4], const Terms& terms, const Group& group, const RowPair& rows, int module,
    int rank) {
    const bf16* low = terms.ds + (module * terms.rank + rank);
    const bf16* high = low + 8LL * group.modules * terms.rank;
    int count = terms.rank - rank - threadIdx.x % 4 * 4;
    Four first = load_four(low, rows.has_low ? count : 0, terms.vector);
    Four second = load_four(high, rows.has_high ? count : 0, terms.vector);
    to[0] = first.pairs[0];
    to[1] = second.pairs[0];
    to[2] = first.pairs[1];
    to[3] = second.pairs[1];
}

/// Adds one module's term to 64 columns from `first`. Columns are dealt to places so that a lane
/// reads and holds eight neighbours: place n of sums[j] is column 32 · (n % 2) + 8 · (n / 2) + j.
/// Places of k: four ranks a lane. `row` is the lane's first row in the segment.
template <bool vector>
__device__ __forceinline__ void add_term(
    float (&sums)[8][4], const Terms& terms, const bf16* weights, int module, const Group& group,
    const RowPair& rows, const Dropout& dropout, int row, int first) {
    int lane = threadIdx.x % 32, quad = lane % 4;
    int column = first + lane / 4 % 2 * 32 + lane / 8 * 8;
    u32 kept[2] = {~0u, ~0u};
    if (dropout.on) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 key = row_key(dropout, row + 8 * i, group, module);
            kept[i] = kept_columns(key, first + 8 * quad, dropout.limit);
        }
    }
    for (int rank = 0; rank < terms.rank; rank += TILE) {
        int own = rank + 4 * quad;
        Eight a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[i] = load_eight<vector>(weights + (long long)(own + i) * group.input, column,
                                      group.input, own + i < terms.rank);
        u32 ds[4];
        load_ds(ds, terms, group, rows, module, rank);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            u32 b[2] = {interleave(a[0].pairs[j / 2], a[1].pairs[j / 2], j % 2),
                        interleave(a[2].pairs[j / 2], a[3].pairs[j / 2], j % 2)};
            float product[4] = {};
            mma(product, ds, b);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                bool keep = kept[e / 2] >> (e % 2 * 8 + j) & 1;
                if (keep) sums[j][e] = fmaf(dropout.kept, product[e], sums[j][e]);
            }
        }
    }
}

/// dx of the lane's two rows: eight columns from `column` on, eight from `column + 32` on.
template <bool vector>
__device__ __forceinline__ void load_dx(
    Eight (&dx)[2][2], const RowPair& rows, int column, int end) {
    stream_rows<vector>(dx[0], rows, column, end);
    stream_rows<vector>(dx[1], rows, column + 32, end);
}

/// Columns `begin .. end` of 16 rows, from `first` in the segment, by one warp.
template <bool vector>
__device__ __forceinline__ void dx_rows(
    const RowPair& rows, const Terms& terms, const Group& group, const Dropout& dropout,
    int first, int begin, int end) {
    int own = threadIdx.x % 4 * 8, row = first + threadIdx.x % 32 / 4;
    Eight next[2][2];
    load_dx<vector>(next, rows, begin + own, group.input);
    for (int column = begin; column < end; column += 64) {
        Eight dx[2][2] = {{next[0][0], next[0][1]}, {next[1][0], next[1][1]}};
        if (column + 64 < end) load_dx<vector>(next, rows, column + 64 + own, group.input);
        float sums[8][4];
        clear(sums);
#pragma unroll
        for (int m = 0; m < MODULES; ++m)
            if (terms.a[m])
                add_term<vector>(
                    sums, terms, terms.a[m], m, group, rows, dropout, row, column);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Eight& values = dx[part][half];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    int e = 2 * half + part;
                    values.pairs[i] = pack(low_half(values.pairs[i]) + sums[2 * i][e],
                                           high_half(values.pairs[i]) + sums[2 * i + 1][e]);
                }
                bf16* to = (bf16*)(half ? rows.high : rows.low);
                store_eight<vector>(to, values, column + own + 32 * part, group.input,
                                    half ? rows.has_high : rows.has_low);
            }
    }
}

/// `dx += drop'(dS A)` over all modules, in order, rounded once. Blocks: tiles of 64 rows × panels
/// of `panel` columns, a multiple of 64. dx `(N, input)`.
extern "C" __global__ void __launch_bounds__(THREADS, 3) smlm_backward_x(
    bf16* dx, const bf16* ds, int panel, const __grid_constant__ Group group) {
    Rows at = find_rows(group, blockIdx.x, ROWS);
    if (at.segment < 0) return;
    Segment segment = read_segment(group, at.segment);
    int first = at.first + (int)threadIdx.x / 32 * TILE;
    if (first >= segment.rows) return;
    Terms terms = read_terms(ds, group, segment, first);
    bool aligned = aligned16(dx) && group.input % 8 == 0;
#pragma unroll
    for (int m = 0; m < MODULES; ++m) aligned = aligned && aligned16(terms.a[m]);
    Dropout dropout = read_dropout(segment);
    bf16* start = dx + (long long)(segment.row + first) * group.input;
    RowPair rows = row_pair(start, segment.rows - first, group.input);
    int begin = blockIdx.y * panel, end = min(begin + panel, group.input);
    if (aligned)
        dx_rows<true>(rows, terms, group, dropout, first, begin, end);
    else
        dx_rows<false>(rows, terms, group, dropout, first, begin, end);
}
