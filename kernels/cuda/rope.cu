// QK norm and rotary embedding (rotate-half: pairs are (i, i + D/2)) of fused query/key/value
// rows, in place, forward beside backward, and the write of keys and values to the paged cache.
//
// Eight lanes hold one head: lane l the columns 8l … 8l+7 of its lower half and the same of its
// upper half, so D is at most 128. Values are rounded once, after norm and rotation.

/// Shapes and pointers that both directions share.
struct Heads {
    int rows;
    int q_heads;
    int kv_heads;
    int head_dim;
    const bf16* q_norm;
    const bf16* k_norm;
    float eps;
    const float* cos;
    const float* sin;
    const int* positions;

    __device__ __forceinline__ int width() const { return (q_heads + 2 * kv_heads) * head_dim; }
    /// Whether all of a lane's eight columns exist and lie at 16-byte boundaries.
    __device__ __forceinline__ bool vector() const {
        return head_dim % 16 == 0 && aligned16(cos) && aligned16(sin) &&
               (q_norm == nullptr || (aligned16(q_norm) && aligned16(k_norm)));
    }
};

/// A lane's part of one head: columns `at …` of both halves.
struct Part {
    float low[8];
    float high[8];
};

__device__ __forceinline__ void load_half(float (&to)[8], const bf16* half, int at, int len,
                                          bool vector) {
    if (vector) {
        Eight eight = {{0, 0, 0, 0}};
        if (at < len) eight = *(const Eight*)(half + at);
        unpack(to, eight);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = at + i < len ? to_float(half[at + i]) : 0.0f;
}
__device__ __forceinline__ void store_half(bf16* half, const float (&from)[8], int at, int len,
                                           bool vector) {
    if (vector) {
        if (at < len) *(Eight*)(half + at) = pack(from);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (at + i < len) half[at + i] = to_bf16(from[i]);
}
__device__ __forceinline__ void load_angles(float (&to)[8], const float* table, int at, int len,
                                            bool vector) {
    if (vector) {
        float4 a = {0, 0, 0, 0}, b = {0, 0, 0, 0};
        if (at < len) {
            a = *(const float4*)(table + at);
            b = *(const float4*)(table + at + 4);
        }
        to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
        to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = at + i < len ? table[at + i] : 0.0f;
}
__device__ __forceinline__ Part load_part(const bf16* head, int at, int half, bool vector) {
    Part part;
    load_half(part.low, head, at, half, vector);
    load_half(part.high, head + half, at, half, vector);
    return part;
}
__device__ __forceinline__ void store_part(bf16* head, const Part& part, int at, int half,
                                           bool vector) {
    store_half(head, part.low, at, half, vector);
    store_half(head + half, part.high, at, half, vector);
}

/// Sum over the eight lanes of a head.
__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
/// Sum over a head of `a · b`.
__device__ __forceinline__ float head_dot(const Part& a, const Part& b) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += a.low[i] * b.low[i] + a.high[i] * b.high[i];
    return head_sum(sum);
}
__device__ __forceinline__ void multiply(Part& a, const Part& b, float factor) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        a.low[i] = a.low[i] * factor * b.low[i];
        a.high[i] = a.high[i] * factor * b.high[i];
    }
}
/// Turns pairs by their angles; `sign` −1 turns them back.
__device__ __forceinline__ void turn(Part& part, const float* cos, const float* sin, float sign,
                                     int at, int half, bool vector) {
    float c[8], s[8];
    load_angles(c, cos, at, half, vector);
    load_angles(s, sin, at, half, vector);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float a = part.low[i], b = part.high[i], turned = sign * s[i];
        part.low[i] = a * c[i] - b * turned;
        part.high[i] = b * c[i] + a * turned;
    }
}

/// Norm and rotation of the query and key heads of `qkv (N, (Q + 2K) D)`; then keys and values of
/// row n go to row `cache_rows[n]` of the caches `(…, K D)`, where that is not −1.
/// Grid: ceil(N · heads / 16) of 128 threads; heads = Q + 2K, or Q + K where `k_cache` is null.
extern "C" __global__ void __launch_bounds__(128)
    rope_forward(bf16* qkv, bf16* k_cache, bf16* v_cache, const int* cache_rows,
                 const bf16* q_norm, const bf16* k_norm, float eps, const float* cos,
                 const float* sin, const int* positions, int rows, int q_heads, int kv_heads,
                 int head_dim) {
    Heads heads = {rows, q_heads, kv_heads, head_dim, q_norm, k_norm, eps, cos, sin, positions};
    int turned = q_heads + kv_heads, half = head_dim / 2, at = (int)threadIdx.x % 8 * 8;
    int all = k_cache == nullptr ? turned : turned + kv_heads;
    long long item = (long long)blockIdx.x * 16 + threadIdx.x / 8;
    // Lanes without a head keep the warp's shuffles whole: they work on the last one and store
    // nothing.
    bool real = item < (long long)rows * all;
    if (!real) item = (long long)rows * all - 1;
    int row = (int)(item / all), index = (int)(item % all);
    bool vector = heads.vector() && aligned16(qkv) && aligned16(k_cache) && aligned16(v_cache);
    bf16* head = qkv + (long long)row * heads.width() + (long long)index * head_dim;
    Part part = load_part(head, at, half, vector);
    if (q_norm != nullptr) {
        float factor = rsqrtf(head_dot(part, part) / (float)head_dim + eps);
        Part weight = load_part(index < q_heads ? q_norm : k_norm, at, half, vector);
        if (index < turned) multiply(part, weight, factor);
    }
    if (!real) return;
    if (index < turned) {
        long long angles = (long long)positions[row] * half;
        turn(part, cos + angles, sin + angles, 1.0f, at, half, vector);
        store_part(head, part, at, half, vector);
    }
    if (k_cache == nullptr || index < q_heads) return;
    int cached = cache_rows[row];
    if (cached < 0) return;
    bf16* cache = index < turned ? k_cache + (long long)(index - q_heads) * head_dim
                                 : v_cache + (long long)(index - turned) * head_dim;
    store_part(cache + (long long)cached * kv_heads * head_dim, part, at, half, vector);
}

/// Undoes the rotation of `d_qkv`, then goes back through the norm, whose input is `raw`.
/// Grid: ceil(N (Q + K) / 16) of 128 threads.
extern "C" __global__ void __launch_bounds__(128)
    rope_backward(bf16* d_qkv, const bf16* raw, const bf16* q_norm, const bf16* k_norm, float eps,
                  const float* cos, const float* sin, const int* positions, int rows, int q_heads,
                  int kv_heads, int head_dim) {
    Heads heads = {rows, q_heads, kv_heads, head_dim, q_norm, k_norm, eps, cos, sin, positions};
    int turned = q_heads + kv_heads, half = head_dim / 2, at = (int)threadIdx.x % 8 * 8;
    long long item = (long long)blockIdx.x * 16 + threadIdx.x / 8;
    bool real = item < (long long)rows * turned;
    if (!real) item = (long long)rows * turned - 1;
    int row = (int)(item / turned), index = (int)(item % turned);
    bool vector = heads.vector() && aligned16(d_qkv) && (q_norm == nullptr || aligned16(raw));
    long long start = (long long)row * heads.width() + (long long)index * head_dim;
    Part d = load_part(d_qkv + start, at, half, vector);
    long long angles = (long long)positions[row] * half;
    turn(d, cos + angles, sin + angles, -1.0f, at, half, vector);
    if (q_norm != nullptr) {
        Part x = load_part(raw + start, at, half, vector);
        Part weight = load_part(index < q_heads ? q_norm : k_norm, at, half, vector);
        float near = rsqrtf(head_dot(x, x) / (float)head_dim + eps);
        multiply(d, weight, 1.0f);
        float far = near * near * near * (head_dot(d, x) / (float)head_dim);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            d.low[i] = near * d.low[i] - far * x.low[i];
            d.high[i] = near * d.high[i] - far * x.high[i];
        }
    }
    if (real) store_part(d_qkv + start, d, at, half, vector);
}
