// Segmented multi-LoRA multiplication, first half of forward: `S = drop(x) Aᵀ` for all modules of
// a group and all segments of a batch, each with its own adapter (SGMV of Chen et al. 2023,
// "Punica"; LoRA of Hu et al. 2021).
//
// S leaves as f32 sums per split of the input, in planes laid out as S; the second half adds them
// up. Reads go from memory to registers, several steps ahead. The host chooses between a kernel
// for many rows per segment and one for few by sizes that it knows; both give the same bits.

/// Rank tiles that a warp multiplies with the same columns of x: modules of one rank tile first.
constexpr int ITEMS = 3;

/// A rank tile of a module, as a lane reads it: rows l/4 and l/4 + 8 of 16 rows of A.
struct Item {
    bool present;
    int module, rank;
    const bf16* low;
    bool has_low, has_high;
    /// Dropout keys of the lane's two rows of x.
    u32 keys[2];
};

/// Item number `index`; `row` is the lane's first row in the segment.
__device__ __forceinline__ Item read_item(
    const Group& group, const Segment& segment, const Dropout& dropout, int index, int row) {
    Item item;
    item.module = index % group.modules;
    item.rank = index / group.modules * TILE;
    Lora lora = read_lora(group, segment.slot, item.module);
    item.present = lora.present && item.rank < lora.rank;
    int rank = item.rank + threadIdx.x % 32 / 4;
    item.low = lora.a + (long long)rank * group.input;
    item.has_low = item.present && rank < lora.rank;
    item.has_high = item.present && rank + 8 < lora.rank;
    item.keys[0] = item.keys[1] = 0;
    if (dropout.on) {
        item.keys[0] = row_key(dropout, row, group, item.module);
        item.keys[1] = row_key(dropout, row + 8, group, item.module);
    }
    return item;
}

/// Adds the product of one STEP: c[0] has ranks 0 … 7 of the tile, c[1] ranks 8 … 15.
__device__ __forceinline__ void shrink_step(
    float (&c)[2][4], const Eight (&x)[2], const Eight& low, const Eight& high) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32 a[4];
        left_factor(a, x[0], x[1], half);
        u32 b[2] = {low.pairs[2 * half], low.pairs[2 * half + 1]};
        mma(c[0], a, b);
        u32 d[2] = {high.pairs[2 * half], high.pairs[2 * half + 1]};
        mma(c[1], a, d);
    }
}

/// One STEP of a present item, from columns of x before dropout.
template <bool vector>
__device__ __forceinline__ void item_step(
    float (&c)[2][4], const Eight (&raw)[2], const Item& item, const Dropout& dropout,
    int input, int column, int end) {
    Eight low = load_eight<vector>(item.low, column, end, item.has_low);
    Eight high = load_eight<vector>(item.low + 8LL * input, column, end, item.has_high);
    Eight x[2] = {raw[0], raw[1]};
    if (dropout.on) {
        drop(x[0], item.keys[0], column, dropout.limit);
        drop(x[1], item.keys[1], column, dropout.limit);
    }
    shrink_step(c, x, low, high);
}

/// Sums of one split, `begin .. end`, of a warp's 16 rows for all items.
template <bool vector>
__device__ __forceinline__ void shrink_split(
    float (&sums)[ITEMS][2][4], const RowPair& rows, const Item (&items)[ITEMS],
    const Dropout& dropout, int input, int begin, int end) {
    constexpr int AHEAD = vector ? 4 : 1;
    int lane_column = 8 * (threadIdx.x % 4);
    Eight ahead[AHEAD][2];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
        stream_rows<vector>(ahead[u], rows, begin + STEP * u + lane_column, end);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) clear(sums[i]);
    for (int chain = begin; chain < end; chain += CHAIN) {
        float partial[ITEMS][2][4];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) clear(partial[i]);
        int chain_end = min(chain + CHAIN, end);
        for (int step = chain; step < chain_end; step += STEP * AHEAD) {
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                int column = step + STEP * u + lane_column;
#pragma unroll
                for (int i = 0; i < ITEMS; ++i)
                    if (items[i].present)
                        item_step<vector>(
                            partial[i], ahead[u], items[i], dropout, input, column, end);
                stream_rows<vector>(ahead[u], rows, column + STEP * AHEAD, end);
            }
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) add(sums[i], partial[i]);
    }
}

/// Whether x and A of all modules of a segment can be read 16 bytes at a time.
__device__ __forceinline__ bool input_aligned(
    const Group& group, const Segment& segment, const bf16* x) {
    bool aligned = group.input % 8 == 0 && aligned16(x);
    for (int module = 0; module < group.modules; ++module) {
        Lora lora = read_lora(group, segment.slot, module);
        aligned = aligned && (!lora.present || aligned16(lora.a));
    }
    return aligned;
}

/// A block's splits of 16 rows of a segment from `first` on, by one warp.
template <bool vector>
__device__ __forceinline__ void shrink_rows(
    float* planes, const bf16* x, u64 plane, const Group& group, const Segment& segment,
    int first) {
    Dropout dropout = read_dropout(segment);
    int rank = group.slots[(long long)segment.slot * SLOT_WIDTH + SLOT_RANK];
    int lane = threadIdx.x % 32;
    const bf16* start = x + (long long)(segment.row + first) * group.input;
    RowPair rows = row_pair(start, segment.rows - first, group.input);
    for (int begin = blockIdx.y * SPLIT; begin < group.input; begin += gridDim.y * SPLIT) {
        int end = min(begin + SPLIT, group.input);
        // One plane for all splits: they are added up there, in order, with the roundings that
        // planes of their own would give.
        bool adds = begin >= (int)gridDim.y * SPLIT;
        float* to = planes + begin / SPLIT % gridDim.y * plane;
        for (int index = 0; index < ceil_div(rank, TILE) * group.modules; index += ITEMS) {
            Item items[ITEMS];
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
                items[i] = read_item(group, segment, dropout, index + i, first + lane / 4);
            float sums[ITEMS][2][4];
            shrink_split<vector>(sums, rows, items, dropout, group.input, begin, end);
#pragma unroll
            for (int i = 0; i < ITEMS; ++i) {
                if (!items[i].present) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    int row = first + lane / 4 + e % 4 / 2 * 8;
                    int j = items[i].rank + e / 4 * 8 + lane % 4 * 2 + e % 2;
                    if (row >= segment.rows || j >= rank) continue;
                    float* cell = to + s_index(group, segment, row, items[i].module, rank) + j;
                    float sum = __fmul_rn(dropout.kept, sums[i][e / 4][e % 4]);
                    *cell = adds ? *cell + sum : sum;
                }
            }
        }
    }
}

/// Sums of splits of `drop(x) Aᵀ`, many rows per segment. Blocks: tiles of 64 rows × splits of the
/// input; where there is one block in y, it loops over the splits and leaves one plane of
/// `plane` elements. x `(N, input)`.
extern "C" __global__ void __launch_bounds__(THREADS, 3) smlm_shrink(
    float* planes, const bf16* x, u64 plane, const __grid_constant__ Group group) {
    Rows at = find_rows(group, blockIdx.x, ROWS);
    if (at.segment < 0) return;
    Segment segment = read_segment(group, at.segment);
    int first = at.first + (int)threadIdx.x / 32 * TILE;
    if (first >= segment.rows) return;
    if (input_aligned(group, segment, x))
        shrink_rows<true>(planes, x, plane, group, segment, first);
    else
        shrink_rows<false>(planes, x, plane, group, segment, first);
}

/// One chain, from column `begin`, of up to 16 rows for one item: all its reads are started before
/// the first product.
template <bool vector>
__device__ __forceinline__ void shrink_chain(
    float (&sum)[2][4], const RowPair& rows, const Item& item, const Dropout& dropout,
    int input, int begin, int end) {
    constexpr int STEPS = CHAIN / STEP, AHEAD = vector ? STEPS : 1;
    int lane_column = 8 * (threadIdx.x % 4);
    const bf16* high = item.low + 8LL * input;
    bool any_high = __any_sync(~0u, rows.has_high);
    clear(sum);
#pragma unroll 1
    for (int step = begin; step < min(begin + CHAIN, end); step += AHEAD * STEP) {
        Eight weights[AHEAD][2], low[AHEAD];
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            int column = step + STEP * u + lane_column;
            weights[u][0] = stream_eight<vector>(item.low, column, end, item.has_low);
            weights[u][1] = stream_eight<vector>(high, column, end, item.has_high);
        }
#pragma unroll
        for (int u = 0; u < AHEAD; ++u)
            low[u] = load_eight<vector>(
                rows.low, step + STEP * u + lane_column, end, rows.has_low);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            int column = step + STEP * u + lane_column;
            Eight x[2] = {low[u], {0, 0, 0, 0}};
            if (any_high) x[1] = load_eight<vector>(rows.high, column, end, rows.has_high);
            if (dropout.on) {
                drop(x[0], item.keys[0], column, dropout.limit);
                drop(x[1], item.keys[1], column, dropout.limit);
            }
            shrink_step(sum, x, weights[u][0], weights[u][1]);
        }
    }
}

/// As [smlm_shrink] for few rows per segment, where reading A is all the work: blocks are tiles of
/// 16 rows × splits × modules, a warp multiplies one chain.
extern "C" __global__ void __launch_bounds__(THREADS, 3) smlm_shrink_few(
    float* planes, const bf16* x, u64 plane, const __grid_constant__ Group group) {
    __shared__ float chains[WARPS][TILE * TILE];
    Rows at = find_rows(group, blockIdx.x, TILE);
    if (at.segment < 0) return;
    Segment segment = read_segment(group, at.segment);
    int module = blockIdx.z, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Lora lora = read_lora(group, segment.slot, module);
    if (!lora.present) return;
    Dropout dropout = read_dropout(segment);
    bool aligned = group.input % 8 == 0 && aligned16(x) && aligned16(lora.a);
    const bf16* start = x + (long long)(segment.row + at.first) * group.input;
    RowPair rows = row_pair(start, segment.rows - at.first, group.input);
    int begin = blockIdx.y * SPLIT, end = min(begin + SPLIT, group.input);
    int count = ceil_div(end - begin, CHAIN), own = begin + warp * CHAIN;
    for (int rank = 0; rank < lora.rank; rank += TILE) {
        int index = rank / TILE * group.modules + module;
        Item item = read_item(group, segment, dropout, index, at.first + lane / 4);
        float sum[2][4];
        if (aligned)
            shrink_chain<true>(sum, rows, item, dropout, group.input, own, end);
        else
            shrink_chain<false>(sum, rows, item, dropout, group.input, own, end);
        __syncthreads();
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            int row = lane / 4 + e % 4 / 2 * 8, j = e / 4 * 8 + lane % 4 * 2 + e % 2;
            chains[warp][row * TILE + j] = sum[e / 4][e % 4];
        }
        __syncthreads();
        for (int cell = threadIdx.x; cell < TILE * TILE; cell += THREADS) {
            int row = at.first + cell / TILE, j = rank + cell % TILE;
            if (row >= segment.rows || j >= lora.rank) continue;
            float total = 0.0f;
            for (int chain = 0; chain < count; ++chain) total += chains[chain][cell];
            planes[blockIdx.y * plane + s_index(group, segment, row, module, lora.rank) + j] =
                __fmul_rn(dropout.kept, total);
        }
    }
}
