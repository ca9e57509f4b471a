// Cross-entropy over rows of logits, and its gradient in their place.

/// Eight logits of a row from column `at`; `count` of them exist.
__device__ __forceinline__ int load_logits(float (&to)[8], const bf16* row, int at, int vocab,
                                           bool vector) {
    if (vector) {
        unpack(to, *(const Eight*)(row + at));
        return 8;
    }
    int count = min(8, vocab - at);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = i < count ? to_float(row[at + i]) : -infinity();
    return count;
}

/// Largest value with the first column that holds it, and the sum of exponents relative to it.
struct Peak {
    float largest;
    int column;
    float sum;
};
/// The better of two: larger, then the lower column.
__device__ __forceinline__ bool beats(float a, int a_column, float b, int b_column) {
    return a > b || (a == b && a_column < b_column);
}

/// Takes eight more logits, columns ascending.
__device__ __forceinline__ void take(Peak& peak, const float (&x)[8], int at, int count) {
    float largest = peak.largest;
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (x[i] > largest) {
            largest = x[i];
            peak.column = at + i;
        }
    if (largest > peak.largest) {
        peak.sum *= __expf(peak.largest - largest);
        peak.largest = largest;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < count) peak.sum += __expf(x[i] - largest);
}

/// The peak of the whole block, to all threads. Order of sums: fixed by threads.
__device__ __forceinline__ Peak block_peak(Peak own, float* shared, int* columns) {
    float largest = block_max(own.largest, shared);
    float sum = block_sum(own.sum * __expf(own.largest - largest), shared);
    // The lowest column among threads that hold the largest value.
    int column = own.largest == largest ? own.column : 0x7fffffff;
    column = (int)__reduce_min_sync(~0u, (u32)column);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    if (lane == 0) columns[warp] = column;
    __syncthreads();
    column = (int)__reduce_min_sync(~0u, lane < warps ? (u32)columns[lane] : 0x7fffffffu);
    return {largest, column, sum};
}

/// Loss, correctness and, where `gradient`, `scale · (softmax − onehot)` in place of the logits.
/// One block per row of min(1024, ceil(V / 8)) threads, a multiple of 32. A NaN logit makes the
/// loss NaN.
extern "C" __global__ void __launch_bounds__(1024)
    loss_rows(bf16* logits, float* loss, int* correct, const int* labels, const float* scale,
              int vocab, int gradient) {
    __shared__ float shared[32];
    __shared__ int columns[32];
    long long row = blockIdx.x;
    bf16* own = logits + row * vocab;
    bool vector = vocab % 8 == 0 && aligned16(logits);
    int first = (int)threadIdx.x * 8, step = (int)blockDim.x * 8, label = labels[row];
    Peak peak = {-largest_float(), 0, 0.0f};
    float x[8];
#pragma unroll 4
    for (int at = first; at < vocab; at += step) {
        int count = load_logits(x, own, at, vocab, vector);
        take(peak, x, at, count);
    }
    float own_logit = to_float(own[label]);
    peak = block_peak(peak, shared, columns);
    if (threadIdx.x == 0) {
        loss[row] = logf(peak.sum) + (peak.largest - own_logit);
        correct[row] = peak.column == label ? 1 : 0;
    }
    if (gradient == 0) return;
    float weight = scale[row], factor = weight / peak.sum;
#pragma unroll 4
    for (int at = first; at < vocab; at += step) {
        int count = load_logits(x, own, at, vocab, vector);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            x[i] = __expf(x[i] - peak.largest) * factor;
            if (at + i == label) x[i] -= weight;
        }
        if (vector) {
            *(Eight*)(own + at) = pack(x);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < count) own[at + i] = to_bf16(x[i]);
    }
}
