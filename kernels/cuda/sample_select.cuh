// Sampling, the selection of a token by one block.
//
// A draw inverts the cumulative weight in descending order of weight, ties by lower id, without a
// sort: tokens have 50-bit keys (30 bits of weight, 20 of the complemented id) whose 10-bit digits
// are found one after another from histograms, as a radix selection does. Weights are summed as
// integers, so that sums do not depend on an order.

/// Tokens that a block's list holds.
constexpr int LIST = 4096;
/// Threads of a block; also bins of a histogram.
constexpr int BINS = 1024;
/// Bits of 2^-14: tokens at least this likely beside the likeliest come to the list at first.
constexpr u32 HEAD_BITS = 0x38800000u;

/// A block's shared memory.
struct Bench {
    u32 counts[BINS];
    u32 masses_low[BINS];
    u32 masses_high[BINS];
    u32 list_bits[LIST];
    int list_ids[LIST];
    u64 words[32];
    u32 small[32];
    float floats[32];
    u64 before_mass;
    u32 before_count;
    u32 digit;
    u32 listed;
};

/// Largest word of a warp, of a block, to all.
__device__ __forceinline__ u64 warp_max_word(u64 x) {
    u32 high = __reduce_max_sync(~0u, (u32)(x >> 32));
    u32 low = __reduce_max_sync(~0u, (u32)(x >> 32) == high ? (u32)x : 0u);
    return (u64)high << 32 | low;
}
__device__ __forceinline__ u64 block_max_word(u64 x, Bench& bench) {
    x = warp_max_word(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) bench.words[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max_word(bench.words[threadIdx.x % 32]);
}
__device__ __forceinline__ u64 warp_sum_word(u64 x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
__device__ __forceinline__ u64 block_sum_word(u64 x, Bench& bench) {
    x = warp_sum_word(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) bench.words[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum_word(bench.words[threadIdx.x % 32]);
}

/// Logits of a row as they are drawn from: the copy where there is one.
struct Logits {
    const bf16* raw;
    const float* adjusted;
    int vocab;
    bool vector;
};

/// Eight of them, −∞ past the vocabulary.
__device__ __forceinline__ void load_logits(float (&x)[8], const Logits& logits, int at) {
    if (at < logits.vocab && logits.adjusted != nullptr) {
        float4 a = *(const float4*)(logits.adjusted + at);
        float4 b = *(const float4*)(logits.adjusted + at + 4);
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
        x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else if (at < logits.vocab && logits.vector) {
        unpack(x, *(const Eight*)(logits.raw + at));
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            x[i] = at + i < logits.vocab ? to_float(logits.raw[at + i]) : -infinity();
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = clean(x[i]);
}

/// How logits become weights relative to the largest; 0 for those that min-p cuts.
struct Weights {
    float largest;
    float factor;
    float floor;
    /// Bits of a weight: they compare as weights do. The likeliest token's are those of 1.
    __device__ __forceinline__ u32 bits(float logit) const {
        float weight = exp2f((logit - largest) * factor);
        return logit > -infinity() && weight >= floor ? __float_as_uint(weight) : 0;
    }
};
/// A weight as a multiple of 2^-44: 2^19 of them add up without overflow.
__device__ __forceinline__ u64 mass_of(u32 bits) {
    int exponent = (int)(bits >> 23);
    u32 mantissa = (bits & 0x7fffffu) | 0x800000u;
    if (exponent >= 106) return (u64)mantissa << (exponent - 106);
    return exponent >= 83 ? mantissa >> (106 - exponent) : 0;
}

/// Number and mass of tokens.
struct Crowd {
    u64 count;
    u64 mass;
};

/// Lists the tokens whose weights' bits lie within the bounds, in no order; `bench.listed` says
/// how many there are, or more than LIST. Returns their sums in `inside`, those of the others in
/// `outside`.
__device__ __noinline__ void collect(Bench& bench, Logits logits, Weights weights, u32 lowest,
                                     u32 highest, Crowd& inside, Crowd& outside) {
    inside = outside = {0, 0};
    __syncthreads();
    if (threadIdx.x == 0) bench.listed = 0;
    __syncthreads();
    for (int at = (int)threadIdx.x * 8; at < logits.vocab; at += BINS * 8) {
        float x[8];
        load_logits(x, logits, at);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            u32 bits = weights.bits(x[i]);
            if (bits == 0) continue;
            u64 mass = mass_of(bits);
            if (bits < lowest || bits > highest) {
                outside = {outside.count + 1, outside.mass + mass};
                continue;
            }
            inside = {inside.count + 1, inside.mass + mass};
            // Once there are too many, their number is of no interest.
            if (*(volatile u32*)&bench.listed > LIST) continue;
            u32 place = atomicAdd(&bench.listed, 1u);
            if (place >= LIST) continue;
            bench.list_bits[place] = bits;
            bench.list_ids[place] = at + i;
        }
    }
    inside = {block_sum_word(inside.count, bench), block_sum_word(inside.mass, bench)};
    outside = {block_sum_word(outside.count, bench), block_sum_word(outside.mass, bench)};
}

/// Adds a token (none where `bits` is 0) to the histogram of digit `level`, if its digits above
/// are `prefix`. All lanes of a warp come here together.
__device__ __forceinline__ void tally(Bench& bench, int level, u64 prefix, u32 bits, int id) {
    u64 key = (u64)bits << 20 | (u32)(0xfffff - id);
    bool match = bits != 0 && key >> (50 - 10 * level) == prefix;
    u32 digit = (u32)(key >> (40 - 10 * level)) & (BINS - 1);
    u32 matching = __ballot_sync(~0u, match);
    if (matching == 0) return;
    // Below the second digit all tokens of a bin have one weight: their number is enough.
    u64 mass = match && level < 2 ? mass_of(bits) : 0;
    u32 leader = (u32)__ffs((int)matching) - 1, count = 1;
    u32 common = __shfl_sync(~0u, digit, (int)leader);
    if (__popc(matching) > 1 && __all_sync(~0u, !match || digit == common)) {
        // Many in one bin would queue for it.
        count = (u32)__popc(matching);
        mass = warp_sum_word(mass);
        match = threadIdx.x % 32 == leader;
    }
    if (!match) return;
    atomicAdd(&bench.counts[digit], count);
    if (mass == 0) return;
    u32 low = (u32)mass, before = atomicAdd(&bench.masses_low[digit], low);
    u32 high = (u32)(mass >> 32) + (before + low < before ? 1u : 0u);
    if (high != 0) atomicAdd(&bench.masses_high[digit], high);
}

/// Histogram of digit `level` over the list or, where it is not whole, over the row.
__device__ __forceinline__ void histogram(Bench& bench, const Logits& logits,
                                          const Weights& weights, bool listed, int level,
                                          u64 prefix) {
    int thread = (int)threadIdx.x;
    __syncthreads();
    bench.counts[thread] = bench.masses_low[thread] = bench.masses_high[thread] = 0;
    __syncthreads();
    if (listed) {
        int count = (int)bench.listed;
        for (int start = 0; start < count; start += BINS) {
            int i = start + thread;
            bool some = i < count;
            tally(bench, level, prefix, some ? bench.list_bits[i] : 0,
                  some ? bench.list_ids[i] : 0);
        }
    } else {
        for (int start = 0; start < logits.vocab; start += BINS * 8) {
            float x[8];
            int at = start + thread * 8;
            load_logits(x, logits, at);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                tally(bench, level, prefix, weights.bits(x[i]), at + i);
        }
    }
    __syncthreads();
}

/// What is looked for: the first token, by descending key, at which the number of tokens or their
/// mass reaches a target.
struct Goal {
    bool by_count;
    u64 target;
};

/// Finds the digit whose bin holds the goal; what lies above it comes to the bench.
__device__ __forceinline__ void choose(Bench& bench, int level, u64 prefix, const Goal& goal) {
    int thread = (int)threadIdx.x, lane = thread % 32, warp = thread / 32;
    u32 digit = BINS - 1 - thread, count = bench.counts[digit];
    u64 mass = (u64)bench.masses_high[digit] << 32 | bench.masses_low[digit];
    if (level == 2) mass = count * mass_of((u32)(prefix << 10) | digit);
    if (level > 2) mass = count * mass_of((u32)(prefix >> (10 * (level - 3))));
    u32 counts = count;
    u64 masses = mass;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        u32 count_before = __shfl_up_sync(~0u, counts, offset);
        u64 mass_before = __shfl_up_sync(~0u, masses, offset);
        if (lane >= offset) counts += count_before, masses += mass_before;
    }
    if (lane == 31) bench.small[warp] = counts, bench.words[warp] = masses;
    __syncthreads();
    counts += __reduce_add_sync(~0u, lane < warp ? bench.small[lane] : 0u);
    masses += warp_sum_word(lane < warp ? bench.words[lane] : 0);
    u64 through = goal.by_count ? counts : masses, own = goal.by_count ? count : mass;
    if (through - own < goal.target && goal.target <= through) {
        bench.digit = digit;
        bench.before_count = counts - count;
        bench.before_mass = masses - mass;
    }
    __syncthreads();
}

/// Digits of the token that reaches a goal: those of its weight, `levels` 3, or all, 5. Returns
/// the key; `mass` becomes that of the tokens through the goal. `listed`: the list holds it.
__device__ __forceinline__ u64 find(Bench& bench, const Logits& logits, const Weights& weights,
                                    bool listed, Goal goal, int levels, u64& mass) {
    u64 prefix = 0, before = 0;
    for (int level = 0; level < levels; ++level) {
        if (!listed && level > 0 && level < 4) {
            int shift = 30 - 10 * level;
            u32 lowest = (u32)prefix << shift, highest = lowest + (1u << shift) - 1;
            Crowd inside, outside;
            collect(bench, logits, weights, lowest, highest, inside, outside);
            listed = bench.listed <= LIST;
        }
        histogram(bench, logits, weights, listed, level, prefix);
        choose(bench, level, prefix, goal);
        goal.target -= goal.by_count ? bench.before_count : bench.before_mass;
        before += bench.before_mass;
        prefix = prefix << 10 | bench.digit;
    }
    u64 each = mass_of((u32)(levels == 3 ? prefix : prefix >> 20));
    u64 equals = goal.by_count || each == 0 ? goal.target : (goal.target + each - 1) / each;
    mass = before + equals * each;
    return prefix;
}
