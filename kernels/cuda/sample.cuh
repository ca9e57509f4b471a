// Sampling, what its two launches share. First every row is scanned by many warps (log-sum-exp and
// best logits of each part), then one block per row puts the parts together, changes the logits
// by penalties and biases, and draws.

/// Logits that one warp scans.
constexpr int PART = 1024;

enum WideColumn { TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION, WIDE_WIDTH };
enum IntColumn {
    SEED_LO, SEED_HI, POSITION, TOP_K, HISTORY, HISTORY_LEN, BIAS, BIAS_LEN, INT_WIDTH
};

/// Bits of a bf16 logit: NaN as −∞, +∞ as the largest number, −0 as 0.
__device__ __forceinline__ u32 clean_bits(u32 bits) {
    if ((bits & 0x7fff) > 0x7f80) return 0xff80;
    if (bits == 0x7f80) return 0x7f7f;
    return bits == 0x8000 ? 0 : bits;
}
__device__ __forceinline__ float clean(float x) {
    return x == x ? fminf(x, 0x1.fep127f) : -infinity();
}
/// Bits of bf16 that compare as the numbers do, and back.
__device__ __forceinline__ u32 ordered(u32 bits) {
    return bits & 0x8000 ? ~bits & 0xffff : bits | 0x8000;
}
__device__ __forceinline__ float of_ordered(u32 ordered) {
    u32 bits = ordered & 0x8000 ? ordered & 0x7fff : ~ordered & 0xffff;
    return __uint_as_float(bits << 16);
}
__device__ __forceinline__ bool is_adjusted(const int* ints) {
    return ints[HISTORY_LEN] > 0 || ints[BIAS_LEN] > 0;
}
