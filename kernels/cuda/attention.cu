// Attention over a paged KV cache for decoding: a token's positions are split over blocks, whose results are merged (flash decoding).
// Macros: HEAD_DIM, CACHE_F32, GROUP (query heads of a key/value head that a block takes together).
#include "common.cuh"

#if CACHE_F32
typedef float Cached;
#else
typedef u16 Cached;
#endif

#define PIECES (HEAD_DIM / 8)  // eight dimensions to a lane
#define LANES (PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32)  // of one position
#define WARPS 4
#define STREAMS (32 / LANES * WARPS)  // positions that a block looks at together

__device__ __forceinline__ void load_cached(const Cached* source, float* out) {
#if CACHE_F32
    float4 a = ((const float4*)source)[0], b = ((const float4*)source)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w, out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
#else
    uint4 words = *(const uint4*)source;
    u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) out[2 * i] = __uint_as_float(w[i] << 16), out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
#endif
}

// Positions that each split of a token takes: whole runs of 32, at least 64.
__device__ __forceinline__ int split_length(int length, int splits) { return max(64, (length + 32 * splits - 1) / (32 * splits) * 32); }

// q comes scaled. Units: (key/value head and group of its query heads, split, token); partial results are
// [token][head][split][HEAD_DIM + 2]: outputs, maximum, sum.
extern "C" __global__ void attention_decode(
    const float* q, int q_stride, const Cached* keys, const Cached* values, int block_size, int heads, int kv_heads,
    const int* positions, const int* rows, const int* tables, int table_width, int window, float cap, float* partials, const int* count
) {
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
            query[g][i] = used && g < live ? q[token * q_stride + (first_head + g) * HEAD_DIM + piece * 8 + i] : 0.0f;
            out[g][i] = 0.0f;
        }
    }
    const int rounds = (stop - start + STREAMS - 1) / STREAMS;  // all lanes take the same, for the shuffles
    for (int round = 0; round < rounds; round++) {
        const int position = start + round * STREAMS + stream;
        const bool visible = position < stop;
        float k[8], v[8];
        if (visible && used) {
            const i64 block = table[position / block_size];
            const i64 at = ((block * kv_heads + kv_head) * block_size + position % block_size) * HEAD_DIM + piece * 8;
            load_cached(keys + at, k);
            load_cached(values + at, v);
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
            if (cap > 0.0f) score = cap * tanhf(score / cap);
            if (visible) {
                const float next = fmaxf(top[g], score), keep = __expf(top[g] - next), p = __expf(score - next);
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
            for (int s = 0; s < STREAMS; s++) total += __expf(maxima[s] - peak) * outputs[s][i];
            partial[i] = total;
        }
        if (threadIdx.x == 0) {
            float total = 0.0f;
            for (int s = 0; s < STREAMS; s++) total += __expf(maxima[s] - peak) * sums[s];
            partial[HEAD_DIM] = peak, partial[HEAD_DIM + 1] = total;
        }
        __syncthreads();
    }
}

// The splits of each head, in order. A warp makes 32 columns of a token's row: columns of a head, and with narrow heads of several.
extern "C" __global__ void attention_merge(
    const float* partials, int splits, int heads, const int* positions, int window, ROWS_ARGUMENTS, const int* count
) {
    const i64 token = blockIdx.y;
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= *count || column / 32 * 32 >= heads * HEAD_DIM) return;
    float value = 0.0f;
    if (column < heads * HEAD_DIM) {
        const int last = positions[token] + 1, length = window ? min(window, last) : last;
        const int run = split_length(length, splits), used = (length + run - 1) / run;
        const float* own = partials + (token * heads + column / HEAD_DIM) * splits * (HEAD_DIM + 2);
        float peak = LOWEST, total = 0.0f;
        for (int s = 0; s < used; s++) peak = fmaxf(peak, own[s * (HEAD_DIM + 2) + HEAD_DIM]);
        for (int s = 0; s < used; s++) {
            const float* part = own + s * (HEAD_DIM + 2);
            const float weight = __expf(part[HEAD_DIM] - peak);
            total += weight * part[HEAD_DIM + 1];
            value += weight * part[column % HEAD_DIM];
        }
        value /= total;
    }
    emit(ROWS_OUT, token, column, value);
}
