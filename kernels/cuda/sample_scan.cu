// Sampling, first launch: log-sum-exp and best logits of parts of rows.

/// A lane's 32 logits of a part as keys: ordered bits, then the complement of the place in the
/// part, so that keys differ and the larger of equal logits' keys has the lower id. 0: no logit.
__device__ __forceinline__ void load_keys(u32 (&keys)[32], const bf16* row, int start, int vocab,
                                          bool vector) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int group = 0; group < 4; ++group) {
        int place = group * 256 + lane * 8, at = start + place;
        Eight eight = {{0, 0, 0, 0}};
        if (vector && at < vocab) eight = *(const Eight*)(row + at);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u32 bits = (eight.pairs[i / 2] >> (16 * (i % 2))) & 0xffff;
            if (!vector && at + i < vocab) bits = row[at + i].bits;
            u32 key = ordered(clean_bits(bits)) << 16 | (0xffffu - (u32)(place + i));
            keys[group * 8 + i] = at + i < vocab ? key : 0;
        }
    }
}
__device__ __forceinline__ float of_key(u32 key) {
    return key == 0 ? -infinity() : of_ordered(key >> 16);
}

/// Of each part of each row: `sums` (largest logit, sum of exponents relative to it) and `bests`,
/// its `kept` best keys, descending, 0 past their end. Rows that penalties or biases will change
/// are copied to `values (rows, parts · PART)`, −∞ past the vocabulary.
/// Grid: ceil(rows · parts / 8) of 256 threads, a warp per part.
extern "C" __global__ void __launch_bounds__(256)
    sample_scan(const bf16* logits, const int* ints, float* values, float2* sums, u32* bests,
                int rows, int vocab, int parts, int kept) {
    long long warp = (long long)blockIdx.x * 8 + threadIdx.x / 32;
    if (warp >= (long long)rows * parts) return;
    int part = (int)(warp % parts), lane = threadIdx.x % 32;
    long long row = warp / parts;
    u32 keys[32];
    load_keys(keys, logits + row * vocab, part * PART, vocab,
              vocab % 8 == 0 && aligned16(logits));
    u32 last = ~0u, first = 0;
    for (int n = 0; n < kept; ++n) {
        u32 best = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) best = max(best, keys[i] < last ? keys[i] : 0u);
        last = __reduce_max_sync(~0u, best);
        if (n == 0) first = last;
        if (lane == 0) bests[warp * kept + n] = last;
    }
    float largest = of_key(first), sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        float x = of_key(keys[i]);
        sum += x > -infinity() ? __expf(x - largest) : 0.0f;
    }
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = {largest, sum};
    if (!is_adjusted(ints + row * INT_WIDTH)) return;
    float4* copy = (float4*)(values + warp * PART);
#pragma unroll
    for (int i = 0; i < 32; i += 4)
        copy[i / 8 * 64 + lane * 2 + i % 8 / 4] = {of_key(keys[i]), of_key(keys[i + 1]),
                                                   of_key(keys[i + 2]), of_key(keys[i + 3])};
}
