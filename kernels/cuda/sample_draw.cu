// Sampling, second launch: a block per row puts its parts together and draws its token. Greedy
// rows without changes end early.

/// Raw logits of a row: the best, and `log Σ exp(x − largest)`.
struct Raw {
    int best;
    float largest;
    float log_sum;
    __device__ __forceinline__ float log_probability(float logit) const {
        return logit > -infinity() ? (logit - largest) - log_sum : -infinity();
    }
};

/// Ordered bits above the complemented id: the largest is the best token, ties to the lower id.
__device__ __forceinline__ u64 candidate(const u32* bests, int index, int kept) {
    u32 key = bests[index];
    u32 id = (u32)(index / kept) * PART + (0xffffu - (key & 0xffffu));
    return key == 0 ? 0 : (u64)(key >> 16) << 32 | (0xffffffffu - id);
}

/// Puts the parts of a row together and writes its `top` best tokens.
__device__ __forceinline__ Raw raw_of_parts(Bench& bench, const float2* sums, const u32* bests,
                                            int parts, int kept, int top, int* top_ids,
                                            float* top_logprobs) {
    float largest = -infinity();
    for (int i = threadIdx.x; i < parts; i += BINS) largest = fmaxf(largest, sums[i].x);
    largest = block_max(largest, bench.floats);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < parts; i += BINS) {
        float2 part = sums[i];
        sum += part.x > -infinity() ? part.y * __expf(part.x - largest) : 0.0f;
    }
    Raw raw = {0, largest, logf(block_sum(sum, bench.floats))};
    u64 last = ~0ull;
    for (int n = 0; n < kept; ++n) {
        u64 best = 0;
        for (int i = threadIdx.x; i < parts * kept; i += BINS) {
            u64 other = candidate(bests, i, kept);
            if (other < last && other > best) best = other;
        }
        last = block_max_word(best, bench);
        int id = last == 0 ? -1 : (int)(0xffffffffu - (u32)last);
        if (n == 0) raw.best = id;
        if (n >= top || threadIdx.x != 0) continue;
        top_ids[n] = id;
        top_logprobs[n] =
            last == 0 ? -infinity() : raw.log_probability(of_ordered((u32)(last >> 32)));
    }
    return raw;
}

/// Penalties, then biases, in the copy. A row's tokens differ within each list, so threads do not
/// meet; tokens outside the vocabulary are skipped.
__device__ __forceinline__ void adjust(float* values, const float* wide, const int* ints,
                                       const int* history, const int* bias_ids, const float* bias,
                                       int vocab) {
    float repetition = wide[REPETITION], frequency = wide[FREQUENCY], presence = wide[PRESENCE];
    for (int i = threadIdx.x; i < ints[HISTORY_LEN]; i += BINS) {
        const int* pair = history + 2 * ((long long)ints[HISTORY] + i);
        if (pair[0] < 0 || pair[0] >= vocab) continue;
        float x = values[pair[0]];
        x = x > 0.0f ? x / repetition : x * repetition;
        if (pair[1] > 0) x = x - frequency * (float)pair[1] - presence;
        values[pair[0]] = x;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < ints[BIAS_LEN]; i += BINS) {
        int token = bias_ids[(long long)ints[BIAS] + i];
        float by = bias[(long long)ints[BIAS] + i];
        if (token < 0 || token >= vocab) continue;
        values[token] = by <= -100.0f ? -infinity() : values[token] + by;
    }
    __syncthreads();
}

/// Largest logit of a row, ties to the lower id.
__device__ __forceinline__ int best_logit(Bench& bench, const Logits& logits, float& largest) {
    float x[8], best = -infinity();
    int id = -1;
    for (int at = (int)threadIdx.x * 8; at < logits.vocab; at += BINS * 8) {
        load_logits(x, logits, at);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (id < 0 || x[i] > best) best = x[i], id = at + i;
    }
    // −0 and 0 are equal.
    u32 bits = __float_as_uint(best == 0.0f ? 0.0f : best);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    u64 word = block_max_word(id < 0 ? 0 : (u64)bits << 32 | (0xffffffffu - (u32)id), bench);
    bits = (u32)(word >> 32);
    largest = __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
    return (int)(0xffffffffu - (u32)word);
}

/// The token drawn from a row whose best is known. First top-k, then top-p shorten the list to a
/// prefix, of which only the mass matters; then the draw is a token at a mass.
__device__ __forceinline__ int draw(Bench& bench, const Logits& logits, const Weights& weights,
                                    const float* wide, const int* ints, int best) {
    Crowd head, tail;
    collect(bench, logits, weights, HEAD_BITS, 0x7fffffffu, head, tail);
    bool whole = bench.listed <= LIST;
    u64 total = head.mass + tail.mass, key = 0;
    if (total == 0) return best;
    u32 hash = absorb(absorb(absorb(0, (u32)ints[SEED_LO]), (u32)ints[SEED_HI]),
                      (u32)ints[POSITION]);
    for (int phase = 0; phase < 3; ++phase) {
        Goal goal = {phase == 0, 0};
        if (phase == 0) {
            if (ints[TOP_K] < 1 || (u64)ints[TOP_K] >= head.count + tail.count) continue;
            goal.target = (u64)ints[TOP_K];
        } else if (phase == 1) {
            if (!(wide[TOP_P] < 1.0f)) continue;
            u64 target = __double2ull_ru((double)wide[TOP_P] * (double)total);
            goal.target = min(max(target, 1ull), total);
        } else {
            // floor(uniform · total) + 1: the sum must be above.
            goal.target = __umul64hi(total, (u64)(hash >> 8) << 40) + 1;
        }
        bool listed = whole && goal.target <= (goal.by_count ? head.count : head.mass);
        key = find(bench, logits, weights, listed, goal, phase == 2 ? 5 : 3, total);
        whole = whole && listed;
    }
    int id = 0xfffff - (int)(key & 0xfffff);
    return id < logits.vocab ? id : best;
}

/// Draws a token per row; see the top of this file. `values`, `sums`, `bests` of [sample_scan].
/// Grid: rows, of 1024 threads.
extern "C" __global__ void __launch_bounds__(BINS)
    sample_draw(const bf16* logits, const float* wide, const int* ints, const int* history,
                const int* bias_ids, const float* bias, float* values, const float2* sums,
                const u32* bests, int* tokens, float* logprobs, int* top_ids,
                float* top_logprobs, int vocab, int parts, int kept, int top) {
    __shared__ Bench bench;
    long long row = blockIdx.x;
    wide += row * WIDE_WIDTH, ints += row * INT_WIDTH, logits += row * vocab;
    values += row * parts * PART;
    Raw raw = raw_of_parts(bench, sums + row * parts, bests + row * parts * kept, parts, kept,
                           top, top_ids + row * top, top_logprobs + row * top);
    bool random = wide[TEMPERATURE] > 0.0f && wide[TOP_P] > 0.0f;
    Logits from = {logits, nullptr, vocab, vocab % 8 == 0 && aligned16(logits)};
    int token = raw.best;
    float largest = raw.largest;
    if (is_adjusted(ints)) {
        adjust(values, wide, ints, history, bias_ids, bias, vocab);
        from.adjusted = values;
        token = best_logit(bench, from, largest);
    }
    if (random && largest > -infinity()) {
        const float log2e = 1.44269504f;
        float factor = fminf(log2e / wide[TEMPERATURE], largest_float());
        token = draw(bench, from, {largest, factor, wide[MIN_P]}, wide, ints, token);
    }
    if (threadIdx.x != 0) return;
    tokens[row] = token;
    logprobs[row] = raw.log_probability(clean(to_float(logits[token])));
}
