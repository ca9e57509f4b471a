// Copies of whole rows by index, moves, fills and conversions. All are bound by memory: 16-byte
// accesses where alignment allows, smaller ones elsewhere.

/// Elements of a row that one block of 256 threads copies.
constexpr int ROW_PART = 2048;

/// Copies ROW_PART elements (fewer at the end) of one row.
__device__ __forceinline__ void copy_part(bf16* to, const bf16* from, int width, bool vector) {
    int start = (int)blockIdx.y * ROW_PART;
    if (vector) {
        int at = start + (int)threadIdx.x * 8;
        if (at < width) *(Eight*)(to + at) = *(const Eight*)(from + at);
        return;
    }
#pragma unroll
    for (int i = 0; i < ROW_PART; i += 256) {
        int at = start + i + (int)threadIdx.x;
        if (at < width) to[at] = from[at];
    }
}

/// `y[i] = x[ids[i]]`, rows of `width`. Grid (rows, ceil(width / ROW_PART)) of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    rows_gather(bf16* y, const bf16* x, const int* ids, int width) {
    bool vector = width % 8 == 0 && aligned16(y) && aligned16(x);
    long long row = blockIdx.x;
    copy_part(y + row * width, x + (long long)ids[row] * width, width, vector);
}

/// `y[ids[i]] = x[i]`, rows of `width`. Grid as [rows_gather].
extern "C" __global__ void __launch_bounds__(256)
    rows_scatter(bf16* y, const bf16* x, const int* ids, int width) {
    bool vector = width % 8 == 0 && aligned16(y) && aligned16(x);
    long long row = blockIdx.x;
    copy_part(y + (long long)ids[row] * width, x + row * width, width, vector);
}

__device__ __forceinline__ u64 grid_thread() {
    return (u64)blockIdx.x * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ u64 grid_threads() { return (u64)gridDim.x * blockDim.x; }

/// The 2-byte units of a run of memory before its first 16-byte boundary.
__device__ __forceinline__ u64 units_to_boundary(const void* start, u64 units) {
    u64 head = ((16 - ((u64)start & 15)) & 15) / 2;
    return head < units ? head : units;
}

/// Fills `units` 2-byte units with a pattern of two units: one float, or one bf16 value twice.
/// Any grid; at least 16 threads in all.
extern "C" __global__ void __launch_bounds__(256)
    rows_fill(unsigned short* to, u64 units, u32 pattern) {
    u64 head = units_to_boundary(to, units), vectors = (units - head) / 8;
    u64 thread = grid_thread();
    // A pattern that starts in the middle has its halves exchanged.
    u32 turned = head % 2 == 0 ? pattern : (pattern << 16) | (pattern >> 16);
    Eight value = {{turned, turned, turned, turned}};
    Eight* body = (Eight*)(to + head);
    for (u64 i = thread; i < vectors; i += grid_threads()) body[i] = value;
    u64 rest = head + vectors * 8;
    if (thread < head) to[thread] = (unsigned short)(pattern >> (16 * (thread % 2)));
    if (thread < units - rest) {
        u64 at = rest + thread;
        to[at] = (unsigned short)(pattern >> (16 * (at % 2)));
    }
}

template <typename T>
__device__ __forceinline__ void copy_strided(void* to, const void* from, u64 count) {
    T* target = (T*)to;
    const T* source = (const T*)from;
    u64 step = grid_threads(), i = grid_thread();
    // Four loads under way per thread.
    for (; i + 3 * step < count; i += 4 * step) {
        T a = source[i], b = source[i + step], c = source[i + 2 * step], d = source[i + 3 * step];
        target[i] = a;
        target[i + step] = b;
        target[i + 2 * step] = c;
        target[i + 3 * step] = d;
    }
    for (; i < count; i += step) target[i] = source[i];
}

/// Copies `units` 2-byte units between ranges that do not overlap. Any grid; at least 16 threads.
extern "C" __global__ void __launch_bounds__(256)
    rows_copy(unsigned short* to, const unsigned short* from, u64 units) {
    u64 apart = (u64)to ^ (u64)from, thread = grid_thread();
    if ((apart & 15) == 0) {
        u64 head = units_to_boundary(to, units), vectors = (units - head) / 8;
        u64 rest = head + vectors * 8;
        copy_strided<Eight>(to + head, from + head, vectors);
        if (thread < head) to[thread] = from[thread];
        if (thread < units - rest) to[rest + thread] = from[rest + thread];
    } else if ((apart & 3) == 0 && ((u64)to & 3) == 0) {
        copy_strided<u32>(to, from, units / 2);
        if (thread == 0 && units % 2 == 1) to[units - 1] = from[units - 1];
    } else {
        copy_strided<unsigned short>(to, from, units);
    }
}

/// `to[i] = bf16(from[i])`. A thread takes 8 values: grid ceil(count / 2048) of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    rows_narrow(bf16* to, const float* from, u64 count) {
    u64 at = grid_thread() * 8;
    if (at >= count) return;
    if (aligned16(to) && aligned16(from) && at + 8 <= count) {
        float4 low = *(const float4*)(from + at), high = *(const float4*)(from + at + 4);
        float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        *(Eight*)(to + at) = pack(values);
        return;
    }
    for (u64 i = at; i < at + 8 && i < count; ++i) to[i] = to_bf16(from[i]);
}

/// Element i becomes `bound · (2u − 1)`, u uniform from the hash of (seed, i). A thread takes 8
/// values: grid ceil(count / 2048) of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    rows_fill_uniform(bf16* to, u64 count, u64 seed, float bound) {
    u64 at = grid_thread() * 8;
    if (at >= count) return;
    u32 key = absorb(absorb(0u, (u32)seed), (u32)(seed >> 32));
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        u64 element = at + i;
        float u = uniform(absorb(absorb(key, (u32)element), (u32)(element >> 32)));
        values[i] = (2.0f * u - 1.0f) * bound;
    }
    if (aligned16(to) && at + 8 <= count) {
        *(Eight*)(to + at) = pack(values);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (at + i < count) to[at + i] = to_bf16(values[i]);
}
