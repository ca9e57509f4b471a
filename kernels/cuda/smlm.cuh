// What the kernels of the segmented multi-LoRA multiplication share: the group's tables, tiles of
// segments, dropout, and products along a wide dimension.
//
// The order of every sum is a function of the row alone, never of the batch around it. A product
// along a wide dimension (the input of a module forward, its output backward) is cut into splits
// of SPLIT columns and these into chains of CHAIN. A chain is one run of tensor-core steps from
// zero; chains are added in order within a split, splits in order within the row. Blocks may
// share out splits or loop over them: the bits are the same.

enum Sizes : int {
    /// Rows of a tensor-core tile, ranks of one, and rows of one partial of a gradient.
    TILE = 16,
    /// Columns that a lane quad loads at once: two tensor-core steps, 16 bytes a lane.
    STEP = 32,
    CHAIN = 256,
    SPLIT = 1024,
    /// Modules of a group, at most.
    MODULES = 3,
    /// Threads and warps of a block, of all kernels here.
    THREADS = 128,
    WARPS = THREADS / 32,
    /// Rows of a block's tile where rows are many: 16 per warp.
    ROWS = TILE * WARPS
};

/// A group of modules with a common input, for one layer. Passed by value, as the host lays it
/// out.
struct Group {
    const bf16* pool;
    const int* slots;
    const int* segments;
    int segment_count;
    int layer;
    /// Width of the common input, and of an output row.
    int input, width;
    int modules;
    /// Of each module: which it is, its first output column, its number of output columns.
    int module[MODULES], column[MODULES], columns[MODULES];
};

struct Segment {
    int row, rows, slot, s_start, position;
    u32 seed_lo, seed_hi;
    float dropout;
};

/// One module of a segment's adapter: A `(rank, input)`, B `(columns, rank)`.
struct Lora {
    const bf16* a;
    const bf16* b;
    /// Where the gradient of A starts, that of B follows; negative where it is not trained.
    long long grad;
    int rank;
    float scale;
    bool present;
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ Segment read_segment(const Group& group, int index) {
    const int* row = group.segments + (long long)index * SEGMENT_WIDTH;
    Segment segment;
    segment.row = row[SEGMENT_ROW];
    segment.rows = row[SEGMENT_ROWS];
    segment.slot = row[SEGMENT_SLOT];
    segment.s_start = row[SEGMENT_S_START];
    segment.position = row[SEGMENT_POSITION];
    segment.seed_lo = (u32)row[SEGMENT_SEED_LO];
    segment.seed_hi = (u32)row[SEGMENT_SEED_HI];
    segment.dropout = __int_as_float(row[SEGMENT_DROPOUT_BITS]);
    return segment;
}

/// Weights of the group's module number `index` in a slot.
__device__ __forceinline__ Lora read_lora(const Group& group, int slot, int index) {
    const int* row = group.slots + (long long)slot * SLOT_WIDTH;
    int offset = row[SLOT_MODULE_OFFSET + group.module[index]];
    int grad_page = row[SLOT_GRAD_PAGE];
    long long start = offset + (long long)group.layer * row[SLOT_LAYER_STRIDE];
    Lora lora;
    lora.present = offset >= 0;
    lora.rank = row[SLOT_RANK];
    lora.scale = __int_as_float(row[SLOT_SCALE_BITS]);
    lora.a = group.pool + ((long long)row[SLOT_PAGE] * PAGE + start);
    lora.b = lora.a + (long long)lora.rank * group.input;
    lora.grad = grad_page < 0 ? -1 : (long long)grad_page * PAGE + start;
    return lora;
}

/// Where element `(row, module, 0)` of a segment's S lies.
__device__ __forceinline__ long long s_index(
    const Group& group, const Segment& segment, int row, int module, int rank) {
    return (long long)segment.s_start * group.modules +
           ((long long)row * group.modules + module) * rank;
}

/// Some rows of a segment. `segment` is negative where there are none.
struct Rows {
    int segment, first;
};

/// Tile number `tile` of all segments that have a slot; tiles of `tile_rows` rows count from each
/// segment's start. Called by whole warps.
__device__ __forceinline__ Rows find_rows(const Group& group, int tile, int tile_rows) {
    int lane = threadIdx.x % 32;
    for (int base = 0; base < group.segment_count; base += 32) {
        int tiles = 0;
        if (base + lane < group.segment_count) {
            const int* row = group.segments + (long long)(base + lane) * SEGMENT_WIDTH;
            int slot = row[SEGMENT_SLOT], rows = row[SEGMENT_ROWS];
            if (slot >= 0) tiles = ceil_div(rows, tile_rows);
        }
        int through = tiles;
#pragma unroll
        for (int offset = 1; offset < 32; offset <<= 1) {
            int before = __shfl_up_sync(~0u, through, offset);
            if (lane >= offset) through += before;
        }
        u32 holders = __ballot_sync(~0u, tile < through);
        if (holders != 0) {
            int holder = __ffs((int)holders) - 1;
            int before = __shfl_sync(~0u, through - tiles, holder);
            return {base + holder, (tile - before) * tile_rows};
        }
        tile -= __shfl_sync(~0u, through, 31);
    }
    return {-1, 0};
}

// ---- dropout ---------------------------------------------------------------------------------

/// Column `c` of a row is kept where `absorb(key of the row, c) > limit`.
struct Dropout {
    bool on;
    u32 seed, position, limit;
    /// What kept values are multiplied with; 0 where none is kept.
    float kept;
};

__device__ __forceinline__ Dropout read_dropout(const Segment& segment) {
    float p = segment.dropout;
    Dropout dropout;
    dropout.on = p > 0.0f;
    dropout.seed = absorb(absorb(0, segment.seed_lo), segment.seed_hi);
    dropout.position = (u32)segment.position;
    // uniform(h) >= p, in integers: h / 256 >= ceil(p · 2^24).
    dropout.limit = ((u32)ceilf(fminf(p, 1.0f) * 0x1p24f) << 8) - 1;
    dropout.kept = !dropout.on ? 1.0f : p < 1.0f ? 1.0f / (1.0f - p) : 0.0f;
    return dropout;
}
/// Key of a segment's row for one module.
__device__ __forceinline__ u32 row_key(
    const Dropout& dropout, int row, const Group& group, int module) {
    u32 key = absorb(dropout.seed, dropout.position + (u32)row);
    return absorb(absorb(key, (u32)group.layer), (u32)group.module[module]);
}
__device__ __forceinline__ bool keeps(u32 key, int column, u32 limit) {
    return absorb(key, (u32)column) > limit;
}
/// Zeros where dropped; the first value is that of `column`.
__device__ __forceinline__ void drop(Eight& values, u32 key, int column, u32 limit) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        u32 low = keeps(key, column + 2 * i, limit) ? 0xffffu : 0;
        u32 high = keeps(key, column + 2 * i + 1, limit) ? 0xffff0000u : 0;
        values.pairs[i] &= low | high;
    }
}

// ---- loads: zeros where there is nothing, and nothing is read there ----------------------------

struct alignas(8) Four {
    u32 pairs[2];
};

__device__ __forceinline__ u32 load_bits(const bf16* from, bool valid) {
    return valid ? (u32)from->bits : 0;
}
/// 16 bytes that stay in the nearest cache.
__device__ __forceinline__ Eight load16(const bf16* from, bool valid) {
    Eight to;
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
        "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
        "@p ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
        : "=&r"(to.pairs[0]), "=&r"(to.pairs[1]), "=&r"(to.pairs[2]), "=&r"(to.pairs[3])
        : "l"(from), "r"((int)valid));
    return to;
}
/// 16 bytes that this kernel reads once.
__device__ __forceinline__ Eight stream16(const bf16* from, bool valid) {
    Eight to;
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %5, 0;\n"
                 "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
                 "@p ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n}"
                 : "=&r"(to.pairs[0]), "=&r"(to.pairs[1]), "=&r"(to.pairs[2]), "=&r"(to.pairs[3])
                 : "l"(from), "r"((int)valid));
    return to;
}
__device__ __forceinline__ Eight load_each(const bf16* row, int column, int end, bool valid) {
    Eight to;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int at = column + 2 * i;
        u32 low = load_bits(row + at, valid && at < end);
        u32 high = load_bits(row + at + 1, valid && at + 1 < end);
        to.pairs[i] = low | (high << 16);
    }
    return to;
}
/// Eight values of a row from `column` on, none from `end` on. `vector`: rows start at multiples
/// of 16 bytes, and `column` and `end` are multiples of 8.
template <bool vector>
__device__ __forceinline__ Eight load_eight(const bf16* row, int column, int end, bool valid) {
    if constexpr (vector) return load16(row + column, valid && column < end);
    return load_each(row, column, end, valid);
}
/// As [load_eight], for what is read once.
template <bool vector>
__device__ __forceinline__ Eight stream_eight(const bf16* row, int column, int end, bool valid) {
    if constexpr (vector) return stream16(row + column, valid && column < end);
    return load_each(row, column, end, valid);
}
/// 8 bytes, as [load16].
__device__ __forceinline__ Four load8(const bf16* from, bool valid) {
    Four to;
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
        "@p ld.global.nc.v2.u32 {%0,%1}, [%2];\n}"
        : "=&r"(to.pairs[0]), "=&r"(to.pairs[1])
        : "l"(from), "r"((int)valid));
    return to;
}
/// 4 bytes, as [load16].
__device__ __forceinline__ u32 load4(const bf16* from, bool valid) {
    u32 to;
    asm("{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\nmov.b32 %0, 0;\n"
        "@p ld.global.nc.u32 %0, [%1];\n}"
        : "=&r"(to)
        : "l"(from), "r"((int)valid));
    return to;
}
/// Four values, of which `count` exist. `vector`: `from` is a multiple of 8 bytes, `count` of 4.
__device__ __forceinline__ Four load_four(const bf16* from, int count, bool vector) {
    if (vector) return load8(from, count > 0);
    Four to;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        u32 low = load_bits(from + 2 * i, 2 * i < count);
        to.pairs[i] = low | (load_bits(from + 2 * i + 1, 2 * i + 1 < count) << 16);
    }
    return to;
}
/// Stores what [load_eight] would load.
template <bool vector>
__device__ __forceinline__ void store_eight(
    bf16* row, const Eight& values, int column, int end, bool valid) {
    bf16* to = row + column;
    if constexpr (vector) {
        if (valid && column < end) *(Eight*)to = values;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u32 pair = values.pairs[i / 2];
            if (valid && column + i < end)
                to[i].bits = (unsigned short)(i % 2 ? pair >> 16 : pair & 0xffffu);
        }
    }
}

// ---- products ----------------------------------------------------------------------------------

/// The tensor core sums over 16 places of k. Which column a place stands for is free as long as
/// both factors agree: here lane quad member q holds 8 consecutive columns 8q … 8q + 7 of a STEP,
/// places 2q, 2q+1, 2q+8, 2q+9 of one step and then of another. The left factor of half `half`,
/// from rows l/4 and l/4 + 8.
__device__ __forceinline__ void left_factor(
    u32 (&a)[4], const Eight& low, const Eight& high, int half) {
    a[0] = low.pairs[2 * half];
    a[1] = high.pairs[2 * half];
    a[2] = low.pairs[2 * half + 1];
    a[3] = high.pairs[2 * half + 1];
}
/// The low (0) or high (1) halves of two words, as one.
__device__ __forceinline__ u32 interleave(u32 first, u32 second, int high) {
    return __byte_perm(first, second, high ? 0x7632 : 0x5410);
}
template <int count>
__device__ __forceinline__ void clear(float (&c)[count][4]) {
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][e] = 0.0f;
}
template <int count>
__device__ __forceinline__ void add(float (&c)[count][4], const float (&d)[count][4]) {
#pragma unroll
    for (int i = 0; i < count; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][e] += d[i][e];
}

/// Two rows of an activation as a lane reads them: l/4 and l/4 + 8 of its warp's tile.
struct RowPair {
    const bf16* low;
    const bf16* high;
    bool has_low, has_high;
};
/// `first` points at the tile's first row, of which `rows` exist.
__device__ __forceinline__ RowPair row_pair(const bf16* first, int rows, int stride) {
    int row = threadIdx.x % 32 / 4;
    const bf16* low = first + (long long)row * stride;
    return {low, low + 8LL * stride, row < rows, row + 8 < rows};
}
template <bool vector>
__device__ __forceinline__ void stream_rows(
    Eight (&to)[2], const RowPair& rows, int column, int end) {
    to[0] = stream_eight<vector>(rows.low, column, end, rows.has_low);
    to[1] = stream_eight<vector>(rows.high, column, end, rows.has_high);
}
