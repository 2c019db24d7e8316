// From a row of logits to a token, as kernels/cpu/sampling.py: mask, penalties, bias, temperature, top-k, top-p, min-p and a draw, in
// that order, with the same random numbers. kernels/cpu/sampling_layout.py states the words of a row's description; addresses in it are
// of the device, and the ids of one list differ from each other. A block has a row.
// Weights are probabilities times a constant, 1 for the most likely token. They are added up as integers, so that no order matters.
#include "common.cuh"

#ifdef CUDA_ON_HOST
#define NEGATIVE_INFINITY (-INFINITY)
#else
#define NEGATIVE_INFINITY __uint_as_float(0xff800000u)
#endif

enum { LOGITS, MODE, OUT, SEED, CHOICE, POSITION, TOP_K, TOP_N, TOP_IDS, TOP_VALUES, MASK };
enum { DRY_IDS = 11, DRY_VALUES, DRY_SIZE, COUNT_IDS, COUNT_VALUES, COUNT_SIZE, BIAS_IDS, BIAS_VALUES, BIAS_SIZE };
enum { TEMPERATURE = 20, TOP_P, MIN_P, FREQUENCY, PRESENCE, REPETITION, TOKEN, PEAK, VALUE, TOTAL, ROW_WORDS };
enum { SAMPLE, ADJUST, ADJUSTED };

struct Room {
    u64 parts[33][4];
    float floats[33];
    int found;
};

// f(index, value) for all values of a row, by all threads; 16 bytes at a time, where the row is aligned.
template <class F>
__device__ __forceinline__ void each(const float* values, int count, F f) {
    const int pieces = (u64)values % 16 ? 0 : count / 4;
    for (int p = threadIdx.x; p < pieces; p += blockDim.x) {
        const float4 v = ((const float4*)values)[p];
        f(4 * p, v.x), f(4 * p + 1, v.y), f(4 * p + 2, v.z), f(4 * p + 3, v.w);
    }
    for (int i = 4 * pieces + threadIdx.x; i < count; i += blockDim.x) f(i, values[i]);
}

__device__ __forceinline__ u64 warp_sum_u64(u64 value) {
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(FULL, value, offset);
    return value;
}

// The sums of N numbers over all threads, in every thread.
template <int N>
__device__ void block_sums(u64 (&values)[N], Room& room) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int i = 0; i < N; i++) {
        values[i] = warp_sum_u64(values[i]);
        if (threadIdx.x % 32 == 0) room.parts[warp][i] = values[i];
    }
    __syncthreads();
    for (int i = 0; i < N; i++) {
        values[i] = 0;
        for (int w = 0; w < warps; w++) values[i] += room.parts[w][i];
    }
    __syncthreads();
}

__device__ float block_max(float value, Room& room) {
    value = warp_max(value);
    if (threadIdx.x % 32 == 0) room.floats[threadIdx.x / 32] = value;
    __syncthreads();
    for (int w = 0; w < blockDim.x / 32; w++) value = fmaxf(value, room.floats[w]);
    __syncthreads();
    return value;
}

__device__ __forceinline__ u64 fixed(float weight) { return (u64)((double)weight * 1099511627776.0 + 0.5); }  // 2**40 is 1

// An integer that orders floats as their values do. -0 and 0 are one.
__device__ __forceinline__ u32 order_of(float value) {
    const u32 bits = __float_as_uint(value == 0.0f ? 0.0f : value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

struct Cut {
    u32 key;    // of the smallest that is kept
    u64 above;  // what those above it add up to
};

// The largest value such that it and those above it reach the target: their weights, or their number.
template <bool WEIGHTS>
__device__ Cut find_cut(const float* values, int count, u64 target, Room& room) {
    u32 low = 0;
    u64 above = 0;
    for (int shift = 30; shift >= 0; shift -= 2) {
        // sums[d]: of values whose bits above `shift` are those of low, then d + 1 or more
        u64 sums[3] = {0, 0, 0};
        const u32 base = low >> shift;
        each(values, count, [&](int, float value) {
            const u32 digit = order_of(value) >> shift;
            if ((digit | 3) != (base | 3)) return;
            const u64 unit = WEIGHTS ? fixed(value) : 1;
            if (digit > base) sums[0] += unit;
            if (digit > base + 1) sums[1] += unit;
            if (digit > base + 2) sums[2] += unit;
        });
        block_sums<3>(sums, room);
        int digit = 0;
        while (digit < 3 && above + sums[digit] >= target) digit++;
        if (digit < 3) above += sums[digit];
        low += (u32)digit << shift;
    }
    return Cut{low, above};
}

// The index of the n-th of those that have this key, or `count` if there are no more than n.
__device__ int last_equal(const float* values, int count, u32 key, u64 n, Room& room) {
    u64 ties[1] = {0};
    each(values, count, [&](int, float value) { ties[0] += order_of(value) == key; });
    block_sums<1>(ties, room);
    if (n >= ties[0]) return count;
    if (threadIdx.x < 32) {
        for (int i = 0; i < count; i += 32) {
            const int lane = threadIdx.x;
            u32 bits = __ballot_sync(FULL, i + lane < count && order_of(values[min(i + lane, count - 1)]) == key);
            const u32 ties_here = __popc(bits);
            if (n > ties_here) {
                n -= ties_here;
                continue;
            }
            for (; n > 1; n--) bits &= bits - 1;
            if (lane == 0) room.found = i + __ffs((int)bits) - 1;
            break;
        }
    }
    __syncthreads();
    const int found = room.found;
    __syncthreads();
    return found;
}

__device__ __forceinline__ float weight_of(float logit, float peak, float scale) {
    const float x = (logit - peak) * scale;
    return x > -87.0f ? expf(x) : 0.0f;
}

// Three rounds of SplitMix64 (doi:10.1145/2714064.2660195): a number in [0, 1).
__device__ double uniform(u64 seed, u64 choice, u64 position) {
    const u64 items[3] = {seed, choice, position};
    u64 state = 0;
    for (int i = 0; i < 3; i++) {
        state += items[i] + 0x9E3779B97F4A7C15ull;
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
        state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
        state ^= state >> 31;
    }
    return (double)(state >> 11) * 1.1102230246251565e-16;  // 2**-53
}

__device__ void add_to_tokens(float* row, int count, float factor, i64 ids, i64 values, i64 size) {
    for (i64 e = threadIdx.x; e < size; e += blockDim.x) {
        const int token = ((const int*)ids)[e];
        if (token >= 0 && token < count) row[token] += factor * ((const float*)values)[e];
    }
    __syncthreads();
}

// Frequency and presence for what was generated, repetition for every token on the list.
__device__ void penalise(float* row, int count, const i64* words, const double* numbers) {
    const float frequency = (float)numbers[FREQUENCY], presence = (float)numbers[PRESENCE], repetition = (float)numbers[REPETITION];
    for (i64 e = threadIdx.x; e < words[COUNT_SIZE]; e += blockDim.x) {
        const int token = ((const int*)words[COUNT_IDS])[e];
        if (token < 0 || token >= count) continue;
        const float times = ((const float*)words[COUNT_VALUES])[e];
        float value = row[token] - times * frequency;
        if (times > 0.0f) value -= presence;
        if (repetition != 1.0f) value = value > 0.0f ? value / repetition : value * repetition;
        row[token] = value;
    }
    __syncthreads();
}

// The `wanted` largest in the order of ids; of equals the first ones.
__device__ void list_largest(const float* row, int count, int wanted, int* ids, float* values, Room& room) {
    const Cut cut = find_cut<false>(row, count, wanted, room);
    const int last = last_equal(row, count, cut.key, wanted - cut.above, room);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int part = (count + 32 * warps - 1) / (32 * warps) * 32, begin = warp * part;
    auto listed = [&](int i) {
        if (i >= count) return false;
        const u32 key = order_of(row[i]);
        return key > cut.key || (key == cut.key && i <= last);
    };
    int size = 0;
    for (int i = begin; i < begin + part; i += 32) size += __popc(__ballot_sync(FULL, listed(i + lane)));
    if (lane == 0) room.parts[warp][0] = size;
    __syncthreads();
    int at = 0;
    for (int w = 0; w < warp; w++) at += (int)room.parts[w][0];
    __syncthreads();
    for (int i = begin; i < begin + part; i += 32) {
        const bool own = listed(i + lane);
        const u32 bits = __ballot_sync(FULL, own);
        const int place = at + __popc(bits & ((1u << lane) - 1));
        if (own && place < wanted) ids[place] = i + lane, values[place] = row[i + lane];
        at += __popc(bits);
    }
    __syncthreads();
}

// descriptions: [rows][ROW_WORDS]; scratch: [rows][2][count] floats.
extern "C" __global__ void __launch_bounds__(1024) sample(i64* descriptions, int count, float* scratch, const int* rows) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.x >= *rows) return;
    __shared__ Room room;
    i64* words = descriptions + (i64)blockIdx.x * ROW_WORDS;
    double* numbers = (double*)words;
    const int padded = (count + 3) / 4 * 4;
    float* copy = scratch + (i64)blockIdx.x * 2 * padded;
    float* weights = copy + padded;
    const i64 mode = words[MODE];
    const float* row = (const float*)words[LOGITS];
    const u32* mask = (const u32*)words[MASK];
    const bool changes = words[DRY_SIZE] + words[COUNT_SIZE] + words[BIAS_SIZE] != 0;
    if (mode == ADJUST || mask || (changes && mode == SAMPLE)) {
        float* out = mode == ADJUST ? (float*)words[OUT] : copy;
        each(row, count, [&](int i, float value) { out[i] = !mask || mask[i / 32] >> (i % 32) & 1 ? value : NEGATIVE_INFINITY; });
        __syncthreads();
        row = out;
        if (mode != ADJUSTED) {
            add_to_tokens(out, count, -1.0f, words[DRY_IDS], words[DRY_VALUES], words[DRY_SIZE]);
            penalise(out, count, words, numbers);
            add_to_tokens(out, count, 1.0f, words[BIAS_IDS], words[BIAS_VALUES], words[BIAS_SIZE]);
        }
    }
    if (mode == ADJUST) return;

    float peak = NEGATIVE_INFINITY, bad = 0.0f;
    each(row, count, [&](int, float value) {
        if (value != value) bad = 1.0f;
        peak = fmaxf(peak, value);
    });
    peak = block_max(peak, room);
    bad = block_max(bad, room);
    if (threadIdx.x == 0) {
        numbers[PEAK] = bad > 0.0f ? (double)__uint_as_float(0x7fc00000u) : (double)peak;
        room.found = count;
    }
    __syncthreads();
    if (bad > 0.0f || peak == NEGATIVE_INFINITY || peak == -NEGATIVE_INFINITY) return;
    int first = count;
    each(row, count, [&](int i, float value) {
        if (value == peak) first = min(first, i);
    });
    if (first < count) atomicMin(&room.found, first);
    __syncthreads();
    int token = room.found;
    __syncthreads();

    const double temperature = numbers[TEMPERATURE];
    const i64 top_k = words[TOP_K], top_n = words[TOP_N];
    const float scale = (float)(1.0 / (temperature > 0.0 ? temperature : 1.0));
    const bool draws = temperature > 0.0 && top_k != 1;
    if (top_n >= 0 || draws) {
        u64 total[1] = {0};
        each(row, count, [&](int i, float value) {
            weights[i] = weight_of(value, peak, scale);
            total[0] += fixed(weights[i]);
        });
        block_sums<1>(total, room);
        if (top_n >= 0 && threadIdx.x == 0) numbers[TOTAL] = (double)total[0] / 1099511627776.0;
        if (draws) {
            if (top_k > 0 && top_k < count) {
                const Cut cut = find_cut<false>(row, count, top_k, room);
                const int last = last_equal(row, count, cut.key, top_k - cut.above, room);
                total[0] = 0;
                each(row, count, [&](int i, float value) {
                    const u32 key = order_of(value);
                    if (key < cut.key || (key == cut.key && i > last)) weights[i] = 0.0f;
                    total[0] += fixed(weights[i]);
                });
                block_sums<1>(total, room);
            }
            // Kept are the weights above a floor, and those equal to it up to an index.
            float floor = (float)numbers[MIN_P];
            int last = -1;
            if (numbers[TOP_P] < 1.0) {
                u64 target = (u64)(numbers[TOP_P] * (double)total[0]);
                target = target < 1 ? 1 : target > total[0] ? total[0] : target;
                const Cut cut = find_cut<true>(weights, count, target, room);
                const float value = __uint_as_float(cut.key & 0x7fffffffu);  // weights are not negative
                if (value > floor) {
                    const u64 unit = fixed(value), rest = target - cut.above;
                    floor = value;
                    last = last_equal(weights, count, cut.key, unit ? (rest + unit - 1) / unit : 1, room);
                }
            }
            auto kept = [&](int i) -> u64 {
                if (i >= count) return 0;
                const float weight = weights[i];
                return weight > floor || (weight == floor && i <= last) ? fixed(weight) : 0;
            };
            // Each warp adds up one part of the vocabulary; then the warp whose part the target is in finds the token.
            const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
            const int part = (count + 32 * warps - 1) / (32 * warps) * 32, begin = warp * part;
            u64 sum = 0;
            for (int i = begin + lane; i < begin + part; i += 32) sum += kept(i);
            sum = warp_sum_u64(sum);
            if (lane == 0) room.parts[warp][0] = sum;
            __syncthreads();
            u64 all = 0, before = 0;
            for (int w = 0; w < warps; w++) {
                if (w < warp) before += room.parts[w][0];
                all += room.parts[w][0];
            }
            const double u = uniform((u64)words[SEED], (u64)words[CHOICE], (u64)words[POSITION]);
            u64 target = (u64)(u * (double)all);
            if (all && target >= all) target = all - 1;
            if (threadIdx.x == 0) room.found = token;
            __syncthreads();
            if (before <= target && target < before + sum) {
                for (int i = begin; i < begin + part; i += 32) {
                    u64 up_to = kept(i + lane);
                    for (int offset = 1; offset < 32; offset <<= 1) {
                        const u64 other = __shfl_up_sync(FULL, up_to, offset);
                        if (lane >= offset) up_to += other;
                    }
                    const u32 bits = __ballot_sync(FULL, before + up_to > target);
                    if (bits) {
                        if (lane == 0) room.found = i + __ffs((int)bits) - 1;
                        break;
                    }
                    before += __shfl_sync(FULL, up_to, 31);
                }
            }
            __syncthreads();
            token = room.found;
            __syncthreads();
        }
    }
    if (threadIdx.x == 0) {
        words[TOKEN] = token;
        if (top_n >= 0) numbers[VALUE] = (double)row[token];
    }
    if (top_n > 0) list_largest(row, count, (int)min(top_n, (i64)count), (int*)words[TOP_IDS], (float*)words[TOP_VALUES], room);
}
