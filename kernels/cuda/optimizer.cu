// Gradient norm and AdamW (Loshchilov & Hutter 2019) over flat adapters.

/// Sum over a block of at most 1024 threads, in fixed order, to its first thread.
__device__ __forceinline__ double block_sum_double(double x, double* shared) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = (blockDim.x + 31) / 32;
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    x = lane < warps ? shared[lane] : 0.0;
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

/// Sum of squares of one page, in double precision, so that large gradients do not overflow.
/// Grid: one block of 256 threads per page.
extern "C" __global__ void __launch_bounds__(256)
    optimizer_squares(double* partials, const float* grads, u64 count) {
    __shared__ double shared[32];
    u64 start = (u64)blockIdx.x * PAGE;
    bool vector = aligned16(grads) && start + PAGE <= count;
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < PAGE / 1024; ++i) {
        u64 at = start + i * 1024 + threadIdx.x * 4;
        float values[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (vector) {
            float4 four = *(const float4*)(grads + at);
            values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (at + j < count) values[j] = grads[at + j];
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) sum += (double)values[j] * (double)values[j];
    }
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

/// `norm = [sqrt(Σ partials), finite ? 1 : 0]`. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024)
    optimizer_norm(float* norm, const double* partials, int pages) {
    __shared__ double shared[32];
    double sum = 0.0;
    for (int page = (int)threadIdx.x; page < pages; page += 1024) sum += partials[page];
    sum = block_sum_double(sum, shared);
    if (threadIdx.x == 0) {
        float total = (float)sqrt(sum);
        norm[0] = total;
        norm[1] = total <= largest_float() ? 1.0f : 0.0f;
    }
}

/// Constants of a step; see the kernel below.
struct Step {
    float beta1, beta2, rest1, rest2, decay, rate, root, eps;
};

__device__ __forceinline__ void step_value(float& param, float& m, float& v, float grad,
                                           const Step& step) {
    m = step.beta1 * m + step.rest1 * grad;
    v = step.beta2 * v + step.rest2 * grad * grad;
    param = param * step.decay - step.rate * m / (sqrtf(v) / step.root + step.eps);
}

/// One step of every parameter, and its compute copy; nothing where `norm[1]` is 0. Gradients are
/// scaled so that their norm is at most `limit`, where that is above 0. `rest` = 1 − beta,
/// `decay` = 1 − rate · weight decay, `rate` and `root` with the moments' bias corrected.
/// A thread takes four: grid ceil(count / 1024) of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    optimizer_adamw(float* params, const float* grads, float* m, float* v, bf16* weights,
                    const float* norm, u64 count, float limit, float beta1, float beta2,
                    float rest1, float rest2, float decay, float rate, float root, float eps) {
    u64 at = ((u64)blockIdx.x * 256 + threadIdx.x) * 4;
    if (at >= count || norm[1] == 0.0f) return;
    float clip = limit > 0.0f ? fminf(1.0f, (float)((double)limit / ((double)norm[0] + 1e-6)))
                              : 1.0f;
    Step step = {beta1, beta2, rest1, rest2, decay, rate, root, eps};
    bool vector = at + 4 <= count && aligned16(params) && aligned16(grads) && aligned16(m) &&
                  aligned16(v) && ((u64)weights & 7) == 0;
    if (!vector) {
        for (u64 i = at; i < at + 4 && i < count; ++i) {
            float param = params[i], first = m[i], second = v[i];
            step_value(param, first, second, grads[i] * clip, step);
            params[i] = param;
            m[i] = first;
            v[i] = second;
            weights[i] = to_bf16(param);
        }
        return;
    }
    float4 p = *(float4*)(params + at), g = *(const float4*)(grads + at);
    float4 first = *(float4*)(m + at), second = *(float4*)(v + at);
    step_value(p.x, first.x, second.x, g.x * clip, step);
    step_value(p.y, first.y, second.y, g.y * clip, step);
    step_value(p.z, first.z, second.z, g.z * clip, step);
    step_value(p.w, first.w, second.w, g.w * clip, step);
    *(float4*)(params + at) = p;
    *(float4*)(m + at) = first;
    *(float4*)(v + at) = second;
    *(uint2*)(weights + at) = {pack(p.x, p.y), pack(p.z, p.w)};
}
