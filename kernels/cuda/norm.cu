// RMSNorm over rows (Zhang & Sennrich 2019), forward beside backward, and the residual sum that
// goes before it. One block per row; rows of at most 16 values per thread stay in registers, so
// that each input is read once, the weights beside the row. A thread always holds the same
// columns, whatever the alignment: results do not depend on where a row lies.

/// Eight values of a row from column `at`, 0 past its end. `vector`: columns come in whole eights
/// at 16-byte boundaries.
__device__ __forceinline__ Eight load_eight(const bf16* row, int at, int width, bool vector) {
    Eight eight = {{0, 0, 0, 0}};
    if (vector) {
        if (at < width) eight = *(const Eight*)(row + at);
        return eight;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (at + i < width) eight.pairs[i / 2] |= (u32)row[at + i].bits << (16 * (i % 2));
    return eight;
}
__device__ __forceinline__ void store_eight(bf16* row, const Eight& eight, int at, int width,
                                            bool vector) {
    if (vector) {
        if (at < width) *(Eight*)(row + at) = eight;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (at + i < width)
            row[at + i].bits = (unsigned short)(eight.pairs[i / 2] >> (16 * (i % 2)));
}
__device__ __forceinline__ Eight sum_eight(const Eight& a, const Eight& b) {
    float x[8], y[8];
    unpack(x, a);
    unpack(y, b);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] += y[i];
    return pack(x);
}
__device__ __forceinline__ float squares(const Eight& eight) {
    float x[8], sum = 0.0f;
    unpack(x, eight);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x[i] * x[i];
    return sum;
}

/// Pointers of one row, and how to access it.
struct Row {
    bf16* y;
    bf16* x;
    const bf16* delta;
    const bf16* weight;
    int width;
    bool vector;
};

/// First column of a thread's eight of round `i`.
__device__ __forceinline__ int column(int i) {
    return (i * (int)blockDim.x + (int)threadIdx.x) * 8;
}
/// Eight values of `x`, after the residual sum where there is one, which is then written.
template <bool SUM>
__device__ __forceinline__ Eight take_eight(const Row& row, int at) {
    Eight x = load_eight(row.x, at, row.width, row.vector);
    if (SUM) {
        x = sum_eight(x, load_eight(row.delta, at, row.width, row.vector));
        store_eight(row.x, x, at, row.width, row.vector);
    }
    return x;
}
__device__ __forceinline__ void put_eight(const Row& row, const Eight& eight, const Eight& weights,
                                          float factor, int at) {
    float x[8], weight[8];
    unpack(x, eight);
    unpack(weight, weights);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] * factor * weight[i];
    store_eight(row.y, pack(x), at, row.width, row.vector);
}
__device__ __forceinline__ float row_factor(float sum, int width, float eps, float* shared) {
    return rsqrtf(block_sum(sum, shared) / (float)width + eps);
}

/// A row of at most `HELD` eights per thread.
template <bool SUM, int HELD>
__device__ __forceinline__ void norm_held(const Row& row, float eps, float* shared) {
    Eight x[HELD], weight[HELD];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        weight[i] = load_eight(row.weight, column(i), row.width, row.vector);
        x[i] = take_eight<SUM>(row, column(i));
        sum += squares(x[i]);
    }
    float factor = row_factor(sum, row.width, eps, shared);
#pragma unroll
    for (int i = 0; i < HELD; ++i) put_eight(row, x[i], weight[i], factor, column(i));
}
/// A row of any width: `x` is read twice.
template <bool SUM>
__device__ __forceinline__ void norm_long(const Row& row, float eps, float* shared) {
    float sum = 0.0f;
    for (int i = 0; column(i) < row.width; ++i) sum += squares(take_eight<SUM>(row, column(i)));
    float factor = row_factor(sum, row.width, eps, shared);
    for (int i = 0; column(i) < row.width; ++i) {
        Eight x = load_eight(row.x, column(i), row.width, row.vector);
        Eight weight = load_eight(row.weight, column(i), row.width, row.vector);
        put_eight(row, x, weight, factor, column(i));
    }
}
template <bool SUM>
__device__ __forceinline__ void norm_row(const Row& row, float eps) {
    __shared__ float shared[32];
    int span = 8 * (int)blockDim.x;
    if (row.width <= span)
        norm_held<SUM, 1>(row, eps, shared);
    else if (row.width <= 2 * span)
        norm_held<SUM, 2>(row, eps, shared);
    else
        norm_long<SUM>(row, eps, shared);
}

/// `y = x / sqrt(mean(x²) + eps) · weight`. A block per row of min(1024, ceil(width / 8)) threads,
/// a multiple of 32.
extern "C" __global__ void __launch_bounds__(1024, 2)
    norm_rms(bf16* y, const bf16* x, const bf16* weight, int width, float eps) {
    long long start = (long long)blockIdx.x * width;
    bool vector = width % 8 == 0 && aligned16(y) && aligned16(x) && aligned16(weight);
    norm_row<false>({y + start, (bf16*)x + start, nullptr, weight, width, vector}, eps);
}

/// `x += delta`, rounded; then `y` = the norm of that. Grid as [norm_rms].
extern "C" __global__ void __launch_bounds__(1024)
    norm_add_rms(bf16* y, bf16* x, const bf16* delta, const bf16* weight, int width, float eps) {
    long long start = (long long)blockIdx.x * width;
    bool vector = width % 8 == 0 && aligned16(y) && aligned16(x) && aligned16(delta) &&
                  aligned16(weight);
    norm_row<true>({y + start, x + start, delta + start, weight, width, vector}, eps);
}

// ---- backward ----------------------------------------------------------------------------------

struct GradientRow {
    bf16* dx;
    const bf16* dy;
    const bf16* x;
    const bf16* weight;
    int width;
    bool vector;
};
/// What the gradient of eight columns is made of.
struct GradientEight {
    Eight x, dy, weight;
};

/// Two sums over a block, as [block_sum]. `shared` holds 64 floats.
__device__ __forceinline__ void block_sums(float& a, float& b, float* shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
    a = warp_sum(a);
    b = warp_sum(b);
    __syncthreads();
    if (lane == 0) {
        shared[warp] = a;
        shared[32 + warp] = b;
    }
    __syncthreads();
    a = warp_sum(lane < warps ? shared[lane] : 0.0f);
    b = warp_sum(lane < warps ? shared[32 + lane] : 0.0f);
}
__device__ __forceinline__ GradientEight load_gradient(const GradientRow& row, int at) {
    return {load_eight(row.x, at, row.width, row.vector),
            load_eight(row.dy, at, row.width, row.vector),
            load_eight(row.weight, at, row.width, row.vector)};
}
/// `Σ dy · x · weight` of eight columns.
__device__ __forceinline__ float products(const GradientEight& eight) {
    float x[8], dy[8], weight[8], sum = 0.0f;
    unpack(x, eight.x);
    unpack(dy, eight.dy);
    unpack(weight, eight.weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += dy[i] * weight[i] * x[i];
    return sum;
}
/// `dx += near · weight · dy − far · x` of eight columns.
__device__ __forceinline__ void put_gradient(const GradientRow& row, const GradientEight& eight,
                                             const Eight& before, float near, float far, int at) {
    float x[8], dy[8], weight[8], dx[8];
    unpack(dx, before);
    unpack(x, eight.x);
    unpack(dy, eight.dy);
    unpack(weight, eight.weight);
#pragma unroll
    for (int i = 0; i < 8; ++i) dx[i] += near * weight[i] * dy[i] - far * x[i];
    store_eight(row.dx, pack(dx), at, row.width, row.vector);
}
__device__ __forceinline__ void gradient_factors(float& near, float& far, float square,
                                                 float along, const GradientRow& row, float eps,
                                                 float* shared) {
    block_sums(square, along, shared);
    near = rsqrtf(square / (float)row.width + eps);
    far = near * near * near * (along / (float)row.width);
}

/// A row of at most one eight per thread.
__device__ __forceinline__ void gradient_held(const GradientRow& row, float eps, float* shared) {
    GradientEight eight = load_gradient(row, column(0));
    Eight before = load_eight(row.dx, column(0), row.width, row.vector);
    float near, far;
    gradient_factors(near, far, squares(eight.x), products(eight), row, eps, shared);
    put_gradient(row, eight, before, near, far, column(0));
}
/// A row of any width: inputs are read twice.
__device__ __forceinline__ void gradient_long(const GradientRow& row, float eps, float* shared) {
    float square = 0.0f, along = 0.0f, near, far;
    for (int i = 0; column(i) < row.width; ++i) {
        GradientEight eight = load_gradient(row, column(i));
        square += squares(eight.x);
        along += products(eight);
    }
    gradient_factors(near, far, square, along, row, eps, shared);
    for (int i = 0; column(i) < row.width; ++i) {
        Eight before = load_eight(row.dx, column(i), row.width, row.vector);
        put_gradient(row, load_gradient(row, column(i)), before, near, far, column(i));
    }
}

/// Adds to `dx` the gradient through the norm of `x`. Grid as [norm_rms].
extern "C" __global__ void __launch_bounds__(1024)
    norm_rms_backward(bf16* dx, const bf16* dy, const bf16* x, const bf16* weight, int width,
                      float eps) {
    __shared__ float shared[64];
    long long start = (long long)blockIdx.x * width;
    bool vector = width % 8 == 0 && aligned16(dx) && aligned16(dy) && aligned16(x) &&
                  aligned16(weight);
    GradientRow row = {dx + start, dy + start, x + start, weight, width, vector};
    if (width <= 8 * (int)blockDim.x)
        gradient_held(row, eps, shared);
    else
        gradient_long(row, eps, shared);
}

/// `x += delta`. A thread takes 8 values: grid ceil(count / 2048) of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    norm_add(bf16* x, const bf16* delta, u64 count) {
    u64 at = ((u64)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= count) return;
    if (aligned16(x) && aligned16(delta) && at + 8 <= count) {
        *(Eight*)(x + at) = sum_eight(*(const Eight*)(x + at), *(const Eight*)(delta + at));
        return;
    }
    for (u64 i = at; i < at + 8 && i < count; ++i)
        x[i] = to_bf16(to_float(x[i]) + to_float(delta[i]));
}
