// What attention.cu does, on tensor cores, for a bfloat16 cache and heads of 64 or 128 dimensions (sm_80 and later).
// Macros: HEAD_DIM, GROUP (query heads of a key/value head that a block takes together, 8 at most).
//
// A product has 16 rows, and there are up to eight heads: rows 8 to 15 are what bfloat16 leaves of rows 0 to 7, of queries and of
// exponentials, so that both keep 16 bits. Keys and values go from the cache to registers as they lie there. Which of a product's columns
// is which dimension or position is free as long as both sides agree: lane l, with g = l / 4 and t = l % 4, has
//   of positions g and g + 8: key dimensions 32 i + 8 t and the seven after it;
//   of positions 2 t, 2 t + 1, 2 t + 8, 2 t + 9: value dimensions 64 i + 8 g and the seven after it;
//   of head g: output dimensions 64 i + 16 t and the fifteen after it.
#include "attention.cuh"
#include "tensor_cores.cuh"

#define CHUNK 16  // positions of a warp's product: they lie in one block of the cache
#define WARPS 4

// Two floats in bfloat16, and what that leaves of them.
__device__ __forceinline__ void split_bf16(float low, float high, u32& upper, u32& lower) {
    upper = pack_bf16(low, high);
    lower = pack_bf16(low - __uint_as_float(upper << 16), high - __uint_as_float(upper & 0xffff0000u));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) attention_decode_bf16(
    const float* q, int q_stride, const u16* keys, const u16* values, int block_size, int heads, int kv_heads, const int* positions,
    const int* rows, const int* tables, int table_width, int window, float cap, float* partials, int* arrived, ROWS_ARGUMENTS,
    const int* count
) {
    let_next_start();
    const int splits = gridDim.y, split = blockIdx.y;
    const i64 token = blockIdx.z;
    if (token >= *count) return;
    const int per_kv = heads / kv_heads, groups = (per_kv + GROUP - 1) / GROUP;
    const int kv_head = blockIdx.x / groups, first_head = kv_head * per_kv + blockIdx.x % groups * GROUP;
    const int live = min(GROUP, (kv_head + 1) * per_kv - first_head);
    const int last = positions[token] + 1, oldest = window ? max(0, last - window) : 0;
    const int run = split_length(last - oldest, splits);
    const int start = oldest + split * run, stop = min(last, start + run);
    if (start >= stop) return;

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int* table = tables + (i64)rows[token] * table_width;
    uint4 key[2][HEAD_DIM / 32], value[4][HEAD_DIM / 64];
    // Where a chunk starts in the cache; behind its end, the last position is read again.
    auto place = [&](int chunk) {
        return (((i64)table[chunk / block_size] * kv_heads + kv_head) * block_size + chunk % block_size) * HEAD_DIM;
    };
    auto load_keys = [&](i64 at, int left) {
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++)
                key[n][i] = *(const uint4*)(keys + at + min(8 * n + g, left - 1) * HEAD_DIM + 32 * i + 8 * t);
    };
    auto load_values = [&](i64 at, int left) {
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 64; i++)
                value[n][i] = *(const uint4*)(values + at + min(n / 2 * 8 + 2 * t + n % 2, left - 1) * HEAD_DIM + 64 * i + 8 * g);
    };
    int chunk = start / CHUNK * CHUNK + warp * CHUNK;
    const i64 begin = chunk < stop ? place(chunk) : 0;
    wait_for_previous();  // which has written the newest position, and the queries
    if (chunk < stop) {
        load_keys(begin, stop - chunk);
        load_values(begin, stop - chunk);
    }

    u32 query[HEAD_DIM / 16][4];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i++) {  // two queries of dimensions 32 (i / 4) + 8 t + 2 (i % 4)
        const float* x = q + token * q_stride + (first_head + g) * HEAD_DIM + i / 4 * 32 + 8 * t + i % 4 * 2;
        const float2 pair = g < live ? *(const float2*)x : make_float2(0.0f, 0.0f);
        split_bf16(pair.x * LOG2E, pair.y * LOG2E, query[i / 2][i % 2 * 2], query[i / 2][i % 2 * 2 + 1]);
    }
    float top = 0.5f * LOWEST, sum = 0.0f, out[HEAD_DIM / 8][4];
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[n][i] = 0.0f;

    for (; chunk < stop; chunk += CHUNK * WARPS) {
        const int next = chunk + CHUNK * WARPS;
        const i64 at = next < stop ? place(next) : 0;
        float scores[4];  // of positions 2t, 2t+1, 2t+8, 2t+9
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++) {
                mma(c, query[2 * i], key[n][i].x, key[n][i].y);
                mma(c, query[2 * i + 1], key[n][i].z, key[n][i].w);
            }
            scores[2 * n] = c[0] + c[2], scores[2 * n + 1] = c[1] + c[3];
        }
        if (next < stop) load_keys(at, stop - next);
        float peak = LOWEST;
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int position = chunk + n / 2 * 8 + 2 * t + n % 2;
            if (cap > 0.0f) scores[n] = capped(scores[n], cap);
            if (position < start || position >= stop) scores[n] = LOWEST;
            peak = fmaxf(peak, scores[n]);
        }
        peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, 2));
        if (__any_sync(FULL, peak > top + SLACK)) {
            const float higher = fmaxf(top, peak), keep = exp2f(top - higher);
            top = higher;
            sum *= keep;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][i] *= keep;
        }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            scores[n] = exp2f(scores[n] - top);
            sum += scores[n];
        }
        u32 p[4];
        split_bf16(scores[0], scores[1], p[0], p[1]);
        split_bf16(scores[2], scores[3], p[2], p[3]);
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 64; i++) {
            u32 words[4][4];
#pragma unroll
            for (int n = 0; n < 4; n++) words[n][0] = value[n][i].x, words[n][1] = value[n][i].y, words[n][2] = value[n][i].z, words[n][3] = value[n][i].w;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 half = j % 2 ? 0x7632 : 0x5410;
                mma(out[8 * i + j], p, __byte_perm(words[0][j / 2], words[1][j / 2], half), __byte_perm(words[2][j / 2], words[3][j / 2], half));
            }
        }
        if (next < stop) load_values(at, stop - next);
    }
    sum += __shfl_xor_sync(FULL, sum, 1);
    sum += __shfl_xor_sync(FULL, sum, 2);

    __shared__ float outputs[WARPS][8][HEAD_DIM + 4], maxima[WARPS][8], sums[WARPS][8];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 64; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float* c = out[8 * i + j];
            outputs[warp][g][64 * i + 16 * t + j] = c[0] + c[2];
            outputs[warp][g][64 * i + 16 * t + 8 + j] = c[1] + c[3];
        }
    if (t == 0) maxima[warp][g] = top, sums[warp][g] = sum;
    __syncthreads();
    const int used = (last - oldest + run - 1) / run;  // splits that have positions
    for (int h = warp; h < live; h += WARPS) {
        float peak = maxima[0][h], total = 0.0f, factors[WARPS];
#pragma unroll
        for (int w = 1; w < WARPS; w++) peak = fmaxf(peak, maxima[w][h]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) factors[w] = exp2f(maxima[w][h] - peak), total += factors[w] * sums[w][h];
        const float factor = used == 1 ? 1.0f / total : 1.0f;
        float* partial = partials + ((token * heads + first_head + h) * splits + split) * (HEAD_DIM + 2);
#pragma unroll
        for (int i = lane; i < HEAD_DIM; i += 32) {
            float merged = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) merged += factors[w] * outputs[w][h][i];
            outputs[0][h][i] = merged * factor;
            if (used > 1) partial[i] = merged;
        }
        if (lane == 0) partial[HEAD_DIM] = peak, partial[HEAD_DIM + 1] = total;
    }

    if (used > 1) {
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            int* own = arrived + token * gridDim.x + blockIdx.x;
            is_last = atomicAdd(own, 1) == used - 1;
            if (is_last) *own = 0;  // as the next launch wants it
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        __shared__ float shares[WARPS][MAX_SPLITS];
        for (int h = warp; h < live; h += WARPS) {
            const float* own = partials + (token * heads + first_head + h) * splits * (HEAD_DIM + 2);  // [split][HEAD_DIM + 2]
            float peak = LOWEST, total = 0.0f, merged[HEAD_DIM / 32] = {};
#pragma unroll 1
            for (int s = lane; s < used; s += 32) peak = fmaxf(peak, __ldcg(own + s * (HEAD_DIM + 2) + HEAD_DIM));
            peak = warp_max(peak);
#pragma unroll 1
            for (int s = lane; s < used; s += 32) {
                const float share = exp2f(__ldcg(own + s * (HEAD_DIM + 2) + HEAD_DIM) - peak);
                shares[warp][s] = share;
                total += share * __ldcg(own + s * (HEAD_DIM + 2) + HEAD_DIM + 1);
            }
            const float factor = 1.0f / warp_sum(total);
            __syncwarp();
#pragma unroll 8
            for (int s = 0; s < used; s++)
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 32; i++) merged[i] += shares[warp][s] * __ldcg(own + s * (HEAD_DIM + 2) + 32 * i + lane);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 32; i++) outputs[0][h][32 * i + lane] = merged[i] * factor;
            __syncwarp();
        }
    }
    for (int h = warp; h < live; h += WARPS)  // what this lane wrote
#pragma unroll 1
        for (int i = lane; i < HEAD_DIM; i += 32) emit(ROWS_OUT, token, (first_head + h) * HEAD_DIM + i, outputs[0][h][i]);
}
