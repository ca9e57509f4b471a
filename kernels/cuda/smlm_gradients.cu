// Segmented multi-LoRA multiplication, backward, weights: `dA += dSᵀ drop(x)`,
// `dB += scale · dyᵀ S`.
//
// A gradient is the sum of one partial per tile of 16 rows counted from the start of its segment,
// zero-padded, added one by one in segment order, then tile order: the same bits for all packings
// of the same examples, in one call or in many. So one block owns a panel of columns of A (or
// rows of B) for all of a slot's rows, and blocks share out panels, never additions.

enum Shapes : int {
    /// Columns of a panel, 16 a warp: rows of 128 bytes.
    PANEL = 64,
    /// Ranks summed in one walk over the rows.
    RANKS = 64,
    RANK_TILES = RANKS / TILE,
    /// Stages of rows in shared memory, and rows of a stage.
    STAGES = 4,
    STAGE_ROWS = 64
};

/// Some rows of x or dy, and of dS or S, with their 16-byte parts permuted so that reads by
/// columns meet no bank twice: part p of row r lies at place p ^ (r % 8).
struct alignas(16) Stage {
    bf16 wide[STAGE_ROWS * PANEL];
    bf16 narrow[STAGE_ROWS * RANKS];
    /// Dropout keys of the rows.
    u32 keys[STAGE_ROWS];
    /// Rows that exist; 0: the walk is over.
    int rows;
    bool drops;
    u32 limit;
    float factor;
};

/// What a block computes: a panel of A's or B's gradient for one slot.
struct Job {
    /// A is (rank, columns) and has dropout, B is (columns, rank).
    bool is_a;
    int module, slot, rank;
    /// First column of the panel and number of columns of the matrix.
    int column, columns;
    /// Row 0, column 0 of the module's x or dy, and elements from row to row.
    const bf16* wide;
    int stride;
    bool wide_aligned;
    /// dS or S.
    const bf16* narrow;
    float scale;
    /// The matrix.
    float* grad;
};

/// A place in the walk over a slot's rows, the same in all threads.
struct Cursor {
    int index, first;
    Segment segment;
};

/// First segment from `from` on that belongs to the slot and has rows; the count if there is
/// none. Called by whole warps.
__device__ __forceinline__ int find_segment(const Group& group, int from, int slot) {
    int lane = threadIdx.x % 32;
    for (int base = from; base < group.segment_count; base += 32) {
        bool found = false;
        if (base + lane < group.segment_count) {
            const int* row = group.segments + (long long)(base + lane) * SEGMENT_WIDTH;
            found = row[SEGMENT_SLOT] == slot && row[SEGMENT_ROWS] > 0;
        }
        u32 holders = __ballot_sync(~0u, found);
        if (holders != 0) return base + __ffs((int)holders) - 1;
    }
    return group.segment_count;
}
__device__ __forceinline__ void enter(Cursor& cursor, const Group& group, int index) {
    cursor.index = index;
    cursor.first = 0;
    if (index < group.segment_count) cursor.segment = read_segment(group, index);
}

/// Place of element `column` of a row, in a matrix of rows of 64 elements.
__device__ __forceinline__ int place(int row, int column) {
    return row * 64 + ((column / 8 ^ row % 8) * 8 + column % 8);
}
/// Starts copying `rows` rows of up to 64 elements, of which `columns` exist; the rest is zeros.
__device__ __forceinline__ void copy_rows(
    bf16* to, const bf16* from, long long stride, int rows, int columns, int parts,
    bool aligned) {
    if (aligned) {
        for (int i = threadIdx.x; i < STAGE_ROWS * parts; i += THREADS) {
            int row = i / parts, column = i % parts * 8;
            bool valid = row < rows && column < columns;
            copy_async(to + place(row, column), valid ? from + row * stride + column : from,
                       valid);
        }
    } else {
        for (int i = threadIdx.x; i < STAGE_ROWS * parts * 8; i += THREADS) {
            int row = i / (parts * 8), column = i % (parts * 8);
            bool valid = row < rows && column < columns;
            to[place(row, column)].bits =
                (unsigned short)load_bits(from + row * stride + column, valid);
        }
    }
}

/// Starts filling a stage with the cursor's rows, ranks from `rank` on, and moves the cursor.
__device__ __forceinline__ void fill_stage(
    Stage& stage, Cursor& cursor, const Job& job, const Group& group, int rank) {
    if (cursor.index >= group.segment_count) {
        if (threadIdx.x == 0) stage.rows = 0;
        return;
    }
    const Segment& segment = cursor.segment;
    int rows = min(segment.rows - cursor.first, (int)STAGE_ROWS);
    const bf16* wide =
        job.wide + (long long)(segment.row + cursor.first) * job.stride + job.column;
    copy_rows(stage.wide, wide, job.stride, rows, job.columns - job.column, PANEL / 8,
              job.wide_aligned);
    const bf16* narrow =
        job.narrow + s_index(group, segment, cursor.first, job.module, job.rank) + rank;
    int ranks = min(job.rank - rank, (int)RANKS);
    copy_rows(stage.narrow, narrow, group.modules * job.rank, rows, ranks,
              ceil_div(ranks, TILE) * 2, job.rank % 8 == 0 && aligned16(narrow));
    Dropout dropout = read_dropout(segment);
    bool drops = job.is_a && dropout.on;
    if (drops && threadIdx.x < STAGE_ROWS)
        stage.keys[threadIdx.x] =
            row_key(dropout, cursor.first + (int)threadIdx.x, group, job.module);
    if (threadIdx.x == 0) {
        stage.rows = rows;
        stage.drops = drops;
        stage.limit = dropout.limit;
        stage.factor = job.is_a ? dropout.kept : job.scale;
    }
    cursor.first += STAGE_ROWS;
    if (cursor.first >= segment.rows)
        enter(cursor, group, find_segment(group, cursor.index + 1, job.slot));
}

/// Zeros dropped inputs of a fragment of 16 rows × 16 columns: b[i] has rows 2q and 2q + 1, + 8
/// for odd i, of column n, + 8 for i of 2 and 3.
__device__ __forceinline__ void drop_fragment(
    u32 (&b)[4], const Stage& stage, int row, int column) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int own_row = row + lane % 4 * 2 + i % 2 * 8, own = column + lane / 4 + i / 2 * 8;
        u32 low = keeps(stage.keys[own_row], own, stage.limit) ? 0xffffu : 0;
        u32 high = keeps(stage.keys[own_row + 1], own, stage.limit) ? 0xffff0000u : 0;
        b[i] &= low | high;
    }
}

/// Adds a stage's partials, tile by tile. Sums of a warp: 16 ranks × two times 8 columns each.
/// Tiles without rows hold zeros, which change no sum.
__device__ __forceinline__ void add_stage(
    float (&sums)[RANK_TILES][2][4], const Stage& stage, const Job& job, int ranks) {
    constexpr int TILES = STAGE_ROWS / TILE;
    int lane = threadIdx.x % 32, columns = threadIdx.x / 32 * TILE;
    float factor = stage.factor;
    // Matrices of eight rows by eight columns, rows first; transposed as they are read.
    u32 wide[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        ldmatrix_transposed(wide[tile], stage.wide + place(tile * TILE + lane % 16,
                                                           columns + lane / 16 * 8));
    if (stage.drops)
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
            drop_fragment(wide[tile], stage, tile * TILE, job.column + columns);
#pragma unroll
    for (int t = 0; t < RANK_TILES; ++t) {
        if (t * TILE >= ranks) break;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            // The same, columns (ranks) first.
            u32 narrow[4];
            int row = tile * TILE + lane % 8 + lane / 16 * 8;
            ldmatrix_transposed(narrow,
                                stage.narrow + place(row, t * TILE + lane / 8 % 2 * 8));
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                u32 b[2] = {wide[tile][2 * n], wide[tile][2 * n + 1]};
                float partial[4] = {};
                mma(partial, narrow, b);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[t][n][e] = fmaf(factor, partial[e], sums[t][n][e]);
            }
        }
    }
}

/// Moves sums of ranks from `rank` on from (`load`) or to memory.
__device__ __forceinline__ void move_sums(
    float (&sums)[RANK_TILES][2][4], const Job& job, int rank, bool load) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int t = 0; t < RANK_TILES; ++t)
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            int j = rank + t * TILE + lane / 4 + e % 4 / 2 * 8;
            int column = job.column + warp * TILE + e / 4 * 8 + lane % 4 * 2 + e % 2;
            float& sum = sums[t][e / 4][e % 4];
            if (load) sum = 0.0f;
            if (j >= job.rank || column >= job.columns) continue;
            long long index = job.is_a ? (long long)j * job.columns + column
                                       : (long long)column * job.rank + j;
            if (load)
                sum = job.grad[index];
            else
                job.grad[index] = sum;
        }
}

/// Adds all of a slot's rows to a panel.
__device__ __forceinline__ void add_panel(
    Stage* stages, const Job& job, const Group& group, int leader) {
    for (int rank = 0; rank < job.rank; rank += RANKS) {
        float sums[RANK_TILES][2][4];
        move_sums(sums, job, rank, true);
        Cursor cursor;
        enter(cursor, group, leader);
        // Nobody reads the last walk's stages any more.
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; ++i) {
            fill_stage(stages[i], cursor, job, group, rank);
            copy_commit();
        }
#pragma unroll 1
        for (int i = 0;; i = (i + 1) % STAGES) {
            copy_wait<STAGES - 2>();
            __syncthreads();
            if (stages[i].rows == 0) break;
            fill_stage(stages[(i + STAGES - 1) % STAGES], cursor, job, group, rank);
            copy_commit();
            add_stage(sums, stages[i], job, min(job.rank - rank, (int)RANKS));
        }
        move_sums(sums, job, rank, false);
    }
}

/// The job of block `number` in x: first panels of A, modules of one panel side by side since
/// they read the same x; then panels of B, module by module. False where there is none.
__device__ __forceinline__ bool read_job(
    Job& job, float* grads, const bf16* dy, const bf16* x, const bf16* s, const bf16* ds,
    const Group& group, int slot, int number) {
    int of_a = ceil_div(group.input, PANEL) * group.modules;
    job.is_a = number < of_a;
    job.module = 0;
    if (job.is_a) {
        job.module = number % group.modules;
        number /= group.modules;
    } else {
        number -= of_a;
        while (number >= ceil_div(group.columns[job.module], PANEL))
            number -= ceil_div(group.columns[job.module++], PANEL);
    }
    Lora lora = read_lora(group, slot, job.module);
    if (!lora.present || lora.grad < 0) return false;
    job.slot = slot;
    job.rank = lora.rank;
    job.scale = lora.scale;
    job.column = number * PANEL;
    job.columns = job.is_a ? group.input : group.columns[job.module];
    job.wide = job.is_a ? x : dy + group.column[job.module];
    job.stride = job.is_a ? group.input : group.width;
    job.narrow = job.is_a ? ds : s;
    job.wide_aligned = aligned16(job.wide) && job.stride % 8 == 0 && job.columns % 8 == 0;
    job.grad = grads + lora.grad + (job.is_a ? 0 : (long long)lora.rank * group.input);
    return true;
}

/// Gradients of A and B of every trained slot, added to `grads`. Blocks: panels of 64 columns of
/// each A and 64 rows of each B × segments, of which a slot's first does the work. x `(N, input)`,
/// dy `(N, width)`. Dynamic shared memory: STAGES stages.
extern "C" __global__ void __launch_bounds__(THREADS, 3) smlm_gradients(
    float* grads, const bf16* dy, const bf16* x, const bf16* s, const bf16* ds,
    const __grid_constant__ Group group) {
    extern __shared__ Eight shared_memory[];
    int leader = blockIdx.y;
    const int* row = group.segments + (long long)leader * SEGMENT_WIDTH;
    int slot = row[SEGMENT_SLOT];
    if (slot < 0 || row[SEGMENT_ROWS] <= 0) return;
    Job job;
    if (!read_job(job, grads, dy, x, s, ds, group, slot, blockIdx.x)) return;
    if (find_segment(group, 0, slot) != leader) return;
    add_panel((Stage*)shared_memory, job, group, leader);
}
