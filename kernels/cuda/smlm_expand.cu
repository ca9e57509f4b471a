// Segmented multi-LoRA multiplication, second half of forward: S from its planes, rounded once and
// kept for backward, and `y += scale · S Bᵀ`.
//
// A lane reads y and B from memory into registers, several steps ahead, and writes y back from
// there: this kernel does little but move y.

/// What a warp reads of 32 output columns: y, eight columns of two rows per lane, and B for the
/// first 16 ranks.
struct Columns {
    Eight y[2];
    u32 b[4][2];
};
/// A warp's part of y and of B.
struct Panel {
    RowPair rows;
    const bf16* b;
    int rank, end;
    float scale;
};

/// Fragments of B for 32 columns from `first` and 16 ranks from `rank`. Columns are dealt to
/// places so that a lane's results are eight neighbours: place n of tile j is column
/// 8 · (n / 2) + 2 · j + n % 2; places of k as in [left_factor], four ranks a lane.
template <bool vector>
__device__ __forceinline__ void load_b(
    u32 (&b)[4][2], const Panel& panel, int first, int rank) {
    int lane = threadIdx.x % 32, place = lane / 4, ranks = panel.rank - rank - 4 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        int column = first + place / 2 * 8 + 2 * j + place % 2;
        const bf16* from = panel.b + (long long)column * panel.rank + rank + 4 * (lane % 4);
        Four four = load_four(from, column < panel.end ? ranks : 0, vector);
        b[j][0] = four.pairs[0];
        b[j][1] = four.pairs[1];
    }
}
template <bool vector>
__device__ __forceinline__ void load_columns(Columns& columns, const Panel& panel, int first) {
    load_b<vector>(columns.b, panel, first, 0);
    stream_rows<vector>(columns.y, panel.rows, first + threadIdx.x % 4 * 8, panel.end);
}

/// S of the warp's rows, 16 ranks from `rank`, from the tile in shared memory.
__device__ __forceinline__ void load_s(u32 (&a)[4], const bf16* tile, int stride, int rank) {
    int lane = threadIdx.x % 32;
    const bf16* from = tile + lane / 4 * stride + rank + lane % 4 * 4;
    Four low = *(const Four*)from, high = *(const Four*)(from + 8 * stride);
    a[0] = low.pairs[0];
    a[1] = high.pairs[0];
    a[2] = low.pairs[1];
    a[3] = high.pairs[1];
}

/// Adds to 32 columns of y. `s` is S of the first 16 ranks, `tile` all of it.
template <bool vector>
__device__ __forceinline__ void expand_columns(
    const Columns& columns, const Panel& panel, const u32 (&s)[4], const bf16* tile, int stride,
    int first) {
    float sums[4][4];
    clear(sums);
#pragma unroll
    for (int j = 0; j < 4; ++j) mma(sums[j], s, columns.b[j]);
    for (int rank = TILE; rank < panel.rank; rank += TILE) {
        u32 a[4], b[4][2];
        load_s(a, tile, stride, rank);
        load_b<vector>(b, panel, first, rank);
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(sums[j], a, b[j]);
    }
    Eight y[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            u32 old = columns.y[half].pairs[j];
            float low = fmaf(panel.scale, sums[j][2 * half], low_half(old));
            float high = fmaf(panel.scale, sums[j][2 * half + 1], high_half(old));
            y[half].pairs[j] = pack(low, high);
        }
    int column = first + threadIdx.x % 4 * 8;
    store_eight<vector>((bf16*)panel.rows.low, y[0], column, panel.end, panel.rows.has_low);
    store_eight<vector>((bf16*)panel.rows.high, y[1], column, panel.end, panel.rows.has_high);
}

/// S as planes of f32 sums, to be added in order.
struct Planes {
    const float* sums;
    u64 size;
    int count;
};
/// A tile of one module's S.
struct Place {
    Segment segment;
    int first, rows, module, rank;
};

/// Adds the planes of a tile of S and rounds; keeps S where `s` is given. The tile in shared
/// memory is filled up with zeros.
__device__ __forceinline__ void sum_planes(
    bf16* tile, int stride, bf16* s, const Planes& planes, const Group& group,
    const Place& place) {
    int ranks = ceil_div(place.rank, TILE) * TILE;
    for (int cell = threadIdx.x; cell < place.rows * ranks; cell += THREADS) {
        int row = place.first + cell / ranks, j = cell % ranks;
        bf16 value = {0};
        if (row < place.segment.rows && j < place.rank) {
            long long index = s_index(group, place.segment, row, place.module, place.rank) + j;
            float sum = planes.sums[index];
#pragma unroll 4
            for (int split = 1; split < planes.count; ++split)
                sum += planes.sums[split * planes.size + index];
            value = to_bf16(sum);
            if (s) s[index] = value;
        }
        tile[cell / ranks * stride + j] = value;
    }
}

/// A block's tile of S, then by each warp its 16 rows of y, 32 columns of the panel at a time.
template <bool vector>
__device__ __forceinline__ void expand_panel(
    const Panel& panel, bf16* s, const Planes& planes, const Group& group, const Place& place,
    int first, int end) {
    extern __shared__ Eight shared_memory[];
    constexpr int AHEAD = vector ? 4 : 1;
    int warp = threadIdx.x / 32, tiles = place.rows / TILE, stride = WARPS / tiles * 32;
    first += warp / tiles * 32;
    bool any = __any_sync(~0u, panel.rows.has_low);
    Columns ahead[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
        if (any && first + u * stride < end)
            load_columns<vector>(ahead[u], panel, first + u * stride);
    // An odd number of 16-rank steps: rows then start in different banks.
    int tile_stride = (ceil_div(place.rank, TILE) | 1) * TILE;
    bf16* tile = (bf16*)shared_memory;
    sum_planes(tile, tile_stride, s, planes, group, place);
    __syncthreads();
    if (!any) return;
    tile += warp % tiles * TILE * tile_stride;
    u32 a[4];
    load_s(a, tile, tile_stride, 0);
    for (int base = first; base < end; base += AHEAD * stride) {
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
            int column = base + u * stride, next = column + AHEAD * stride;
            if (column < end)
                expand_columns<vector>(ahead[u], panel, a, tile, tile_stride, column);
            if (next < end) load_columns<vector>(ahead[u], panel, next);
        }
    }
}

/// S from its planes, and `y += scale · S Bᵀ`. Blocks: tiles of `tile_rows` rows, 64 or 16, ×
/// panels of `panel` columns of each module; a warp has 16 rows and every (64 / tile_rows)th 32
/// columns. y `(N, width)`. Dynamic shared memory: `tile_rows` rows of 272 bf16, the largest
/// rank and a pad.
extern "C" __global__ void __launch_bounds__(THREADS, 3) smlm_expand(
    bf16* y, bf16* s, const float* sums, u64 plane, int plane_count, int tile_rows, int panel,
    const __grid_constant__ Group group) {
    Rows at = find_rows(group, blockIdx.x, tile_rows);
    if (at.segment < 0) return;
    Segment segment = read_segment(group, at.segment);
    int module = 0, number = blockIdx.y;
    while (number >= ceil_div(group.columns[module], panel))
        number -= ceil_div(group.columns[module++], panel);
    Lora lora = read_lora(group, segment.slot, module);
    if (!lora.present) return;
    int columns = group.columns[module], begin = number * panel;
    int first = at.first + (int)threadIdx.x / 32 % (tile_rows / TILE) * TILE;
    bf16* start = y + ((long long)(segment.row + first) * group.width + group.column[module]);
    Panel part = {row_pair(start, segment.rows - first, group.width), lora.b, lora.rank, columns,
                  lora.scale};
    Planes planes = {sums, plane, plane_count};
    Place place = {segment, at.first, tile_rows, module, lora.rank};
    bool aligned = aligned16(y) && group.width % 8 == 0 && group.column[module] % 8 == 0 &&
                   columns % 8 == 0 && lora.rank % 4 == 0 && ((u64)lora.b & 7) == 0;
    // The first panel's block keeps S.
    bf16* kept = number == 0 ? s : nullptr;
    int end = min(begin + panel, columns);
    if (aligned)
        expand_panel<true>(part, kept, planes, group, place, begin, end);
    else
        expand_panel<false>(part, kept, planes, group, place, begin, end);
}
