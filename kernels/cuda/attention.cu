// Attention over a paged KV cache for decoding: a token's positions are split over blocks, whose results are merged (flash decoding).
// Macros: HEAD_DIM, CACHE_F32, GROUP (query heads of a key/value head that a block takes together).
#include "attention.cuh"

#if CACHE_F32
typedef float Cached;
#else
typedef u16 Cached;
#endif

#define PIECES (HEAD_DIM / 8)  // eight dimensions to a lane
#define LANES (PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32)  // of one position
#define WARPS 4
#define STREAMS (32 / LANES * WARPS)  // positions that a block looks at together

// Eight items as they lie in memory.
#if CACHE_F32
struct Eight {
    float4 low, high;
};
#else
typedef uint4 Eight;
#endif

__device__ __forceinline__ void floats_of(const Eight& items, float* out) {
#if CACHE_F32
    const float4 a = items.low, b = items.high;
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
#else
    const u32 w[4] = {items.x, items.y, items.z, items.w};
#pragma unroll
    for (int i = 0; i < 4; i++) out[2 * i] = __uint_as_float(w[i] << 16), out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
#endif
}

// q comes scaled. Units: (key/value head and group of its query heads, split, token); partial results are
// [token][head][split][HEAD_DIM + 2]: outputs, maximum (a logarithm to base 2), sum.
extern "C" __global__ void attention_decode(
    const float* q, int q_stride, const Cached* keys, const Cached* values, int block_size, int heads, int kv_heads,
    const int* positions, const int* rows, const int* tables, int table_width, int window, float cap, float* partials, const int* count
) {
    let_next_start();
    wait_for_previous();
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

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int piece = lane % LANES, stream = warp * (32 / LANES) + lane / LANES;
    const bool used = piece < PIECES;
    const int* table = tables + (i64)rows[token] * table_width;
    float query[GROUP][8], out[GROUP][8], top[GROUP], sum[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        top[g] = LOWEST, sum[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            query[g][i] = used && g < live ? q[token * q_stride + (first_head + g) * HEAD_DIM + piece * 8 + i] * LOG2E : 0.0f;
            out[g][i] = 0.0f;
        }
    }
    Eight key, value;
    auto fetch = [&](int position) {
        if (position >= stop || !used) return;
        const i64 block = table[position / block_size];
        const i64 at = ((block * kv_heads + kv_head) * block_size + position % block_size) * HEAD_DIM + piece * 8;
        key = *(const Eight*)(keys + at);
        value = *(const Eight*)(values + at);
    };
    fetch(start + stream);
    const int rounds = (stop - start + STREAMS - 1) / STREAMS;  // all lanes take the same, for the shuffles
    for (int round = 0; round < rounds; round++) {
        const int position = start + round * STREAMS + stream;
        const bool visible = position < stop;
        float k[8], v[8];
        if (visible && used) {
            floats_of(key, k);
            floats_of(value, v);
            fetch(position + STREAMS);  // under way while these are used
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) k[i] = v[i] = 0.0f;
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; i++) score += query[g][i] * k[i];
#pragma unroll
            for (int offset = LANES / 2; offset; offset >>= 1) score += __shfl_xor_sync(FULL, score, offset);
            if (cap > 0.0f) score = capped(score, cap);
            if (visible) {
                const float next = fmaxf(top[g], score), keep = exp2f(top[g] - next), p = exp2f(score - next);
                top[g] = next;
                sum[g] = sum[g] * keep + p;
#pragma unroll
                for (int i = 0; i < 8; i++) out[g][i] = out[g][i] * keep + p * v[i];
            }
        }
    }

    __shared__ float outputs[STREAMS][HEAD_DIM], maxima[STREAMS], sums[STREAMS];
    for (int g = 0; g < live; g++) {
#pragma unroll
        for (int h = 0; h < GROUP; h++) {  // an index that is known, so that the arrays stay in registers
            if (h != g) continue;
            if (used) {
#pragma unroll
                for (int i = 0; i < 8; i++) outputs[stream][piece * 8 + i] = out[h][i];
            }
            if (piece == 0) maxima[stream] = top[h], sums[stream] = sum[h];
        }
        __syncthreads();
        float peak = LOWEST;
        for (int s = 0; s < STREAMS; s++) peak = fmaxf(peak, maxima[s]);
        float* partial = partials + ((token * heads + first_head + g) * splits + split) * (HEAD_DIM + 2);
        for (int i = threadIdx.x; i < HEAD_DIM; i += blockDim.x) {
            float total = 0.0f;
            for (int s = 0; s < STREAMS; s++) total += exp2f(maxima[s] - peak) * outputs[s][i];
            partial[i] = total;
        }
        if (threadIdx.x == 0) {
            float total = 0.0f;
            for (int s = 0; s < STREAMS; s++) total += exp2f(maxima[s] - peak) * sums[s];
            partial[HEAD_DIM] = peak, partial[HEAD_DIM + 1] = total;
        }
        __syncthreads();
    }
}

#define MERGED (126 / HEAD_DIM + 2)  // heads that 128 columns may belong to

// The splits of each head, in order. A block of 4 warps makes 128 columns of a token's row.
extern "C" __global__ void attention_merge(
    const float* partials, int splits, int heads, const int* positions, int window, ROWS_ARGUMENTS, const int* count
) {
    let_next_start();
    wait_for_previous();
    __shared__ float shares[MERGED][MAX_SPLITS];  // of each head: what a split's outputs are multiplied by
    const i64 token = blockIdx.y;
    if (token >= *count) return;
    const int columns = heads * HEAD_DIM, begin = blockIdx.x * 128, column = begin + threadIdx.x;
    const int last = positions[token] + 1, length = window ? min(window, last) : last;
    const int run = split_length(length, splits), used = (length + run - 1) / run;
    const int first_head = begin / HEAD_DIM, own_heads = min(begin + 127, columns - 1) / HEAD_DIM - first_head + 1;
    const float* own = partials + (token * heads + first_head) * splits * (HEAD_DIM + 2);  // [head][split][HEAD_DIM + 2]
    for (int h = threadIdx.x / 32; h < own_heads; h += 4) {
        const float* ends = own + (i64)h * splits * (HEAD_DIM + 2) + HEAD_DIM;  // maximum, sum
        float peak = LOWEST, total = 0.0f;
        for (int s = threadIdx.x % 32; s < used; s += 32) peak = fmaxf(peak, ends[s * (HEAD_DIM + 2)]);
        peak = warp_max(peak);
        for (int s = threadIdx.x % 32; s < used; s += 32) {
            shares[h][s] = exp2f(ends[s * (HEAD_DIM + 2)] - peak);
            total += shares[h][s] * ends[s * (HEAD_DIM + 2) + 1];
        }
        total = warp_sum(total);
        for (int s = threadIdx.x % 32; s < used; s += 32) shares[h][s] /= total;
    }
    __syncthreads();
    if (column / 32 * 32 >= columns) return;
    float value = 0.0f;
    if (column < columns) {
        const int h = column / HEAD_DIM - first_head;
        const float* outputs = own + (i64)h * splits * (HEAD_DIM + 2) + column % HEAD_DIM;
#pragma unroll 8
        for (int s = 0; s < used; s++) value += shares[h][s] * outputs[s * (HEAD_DIM + 2)];
    }
    emit(ROWS_OUT, token, column, value);
}
