// What every kernel shares: bfloat16 without toolkit headers, tensor-core and copy instructions,
// reductions, randomness, and the columns of the batch's tables. NVRTC compiles this text followed
// by one of the .cu files beside it.
//
// Letters as in the Rust sources: N rows, H hidden, Q and K heads, D head dim, F ffn, V
// vocabulary, R rank.

typedef unsigned int u32;
typedef unsigned long long u64;

// ---- numbers ------------------------------------------------------------------------------------

struct alignas(2) bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7fffffff); }
__device__ __forceinline__ float largest_float() { return __int_as_float(0x7f7fffff); }

__device__ __forceinline__ float to_float(bf16 x) {
    return __uint_as_float((u32)x.bits << 16);
}
/// Rounds to nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
/// Two values in one word, `low` in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ u32 pack(bf16 low, bf16 high) {
    return (u32)low.bits | ((u32)high.bits << 16);
}
__device__ __forceinline__ float low_half(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_half(u32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

/// Eight bf16 values: one 16-byte access.
struct alignas(16) Eight {
    u32 pairs[4];
};
__device__ __forceinline__ void unpack(float (&to)[8], const Eight& from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[2 * i] = low_half(from.pairs[i]);
        to[2 * i + 1] = high_half(from.pairs[i]);
    }
}
__device__ __forceinline__ Eight pack(const float (&from)[8]) {
    Eight to;
#pragma unroll
    for (int i = 0; i < 4; ++i) to.pairs[i] = pack(from[2 * i], from[2 * i + 1]);
    return to;
}
/// Whether 16-byte accesses may start at `pointer`.
__device__ __forceinline__ bool aligned16(const void* pointer) {
    return ((u64)pointer & 15) == 0;
}

// ---- tensor cores and copies --------------------------------------------------------------------

/// `c += a · b`: a 16×16 row-major, b 16×8 column-major, both bf16, c 16×8 float.
/// Lane l holds of c rows l/4 and l/4 + 8, columns 2·(l%4) and the next: c0 c1 | c2 c3; of a the
/// same rows, columns 2·(l%4)+{0,1} (a0, a1 = row + 8) and those + 8 (a2, a3); of b rows
/// 2·(l%4)+{0,1} (b0) and those + 8 (b1) of column l/4.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}
/// Four 8×8 matrices of 2-byte values; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// Starts a copy of 16 bytes to shared memory, zeros where `valid` is false (`from` is then not
/// read, but must be a valid address).
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `pending` groups of this thread's copies are under way.
template <int pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- reductions: fixed order, so that equal inputs give equal bits ------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}
/// Sum over a block of at most 1024 threads, returned to all of them. `shared` holds 32 floats.
__device__ __forceinline__ float block_sum(float x, float* shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? shared[lane] : 0.0f);
}
/// Largest value over a block, as [block_sum].
__device__ __forceinline__ float block_max(float x, float* shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return warp_max(lane < warps ? shared[lane] : -infinity());
}

// ---- randomness: a hash of the words that name a draw -------------------------------------------

/// Takes one more word into a hash that starts at 0.
__device__ __forceinline__ u32 absorb(u32 hash, u32 word) {
    u32 h = (hash + 0x9e3779b9u) ^ word;
    h = (h ^ (h >> 16)) * 0x7feb352du;
    h = (h ^ (h >> 15)) * 0x846ca68bu;
    return h ^ (h >> 16);
}
/// A hash as a number in [0, 1), a multiple of 2^-24.
__device__ __forceinline__ float uniform(u32 hash) { return (float)(hash >> 8) * 0x1p-24f; }

// ---- tables of the batch: the columns of kernels/src/tables.rs ----------------------------------

enum SlotColumn {
    SLOT_PAGE = 0,
    SLOT_RANK = 1,
    SLOT_SCALE_BITS = 2,
    SLOT_LAYER_STRIDE = 3,
    SLOT_GRAD_PAGE = 4,
    SLOT_MODULE_OFFSET = 5,
    SLOT_WIDTH = 12
};
enum SegmentColumn {
    SEGMENT_ROW = 0,
    SEGMENT_ROWS = 1,
    SEGMENT_SLOT = 2,
    SEGMENT_S_START = 3,
    SEGMENT_SEED_LO = 4,
    SEGMENT_SEED_HI = 5,
    SEGMENT_DROPOUT_BITS = 6,
    SEGMENT_POSITION = 7,
    SEGMENT_WIDTH = 8
};
enum SequenceColumn {
    SEQUENCE_ROW = 0,
    SEQUENCE_ROWS = 1,
    SEQUENCE_POSITION = 2,
    SEQUENCE_BLOCKS = 3,
    SEQUENCE_WIDTH = 4
};
/// Elements of a page of the adapter pools.
constexpr int PAGE = 4096;
