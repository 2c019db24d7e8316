// Flash attention (arXiv:2205.14135) on tensor cores over a paged KV cache, for many tokens of a sequence (sm_80 and later).
// Macros: HEAD_DIM (a multiple of 16), KEYS (positions in a tile: 64, or 32).
// A block has 64 query rows, 16 to a warp: row r is query head r % group of token r / group of an item.
#include "tensor_cores.cuh"

#define WIDTH (HEAD_DIM + 8)  // of a row in shared memory: eight more spread rows over the banks

// items: [first token, tokens, row of the block table]. q comes scaled.
extern "C" __global__ void __launch_bounds__(128, HEAD_DIM <= 128 ? 3 : 2) attention_prefill(
    const float* q, int q_stride, const u16* keys, const u16* values, int block_size, int heads, int kv_heads, const int* positions,
    const int* items, const int* tables, int table_width, int window, float cap, float* out_f32, u16* out_bf16, int out_stride,
    const int* count
) {
    let_next_start();
    wait_for_previous();
    if (blockIdx.x >= *count) return;
    const int kv_head = blockIdx.y, group = heads / kv_heads;
    const int first_token = items[3 * blockIdx.x], tokens = items[3 * blockIdx.x + 1];
    const int* table = tables + (i64)items[3 * blockIdx.x + 2] * table_width;
    const int position = positions[first_token], last = position + tokens;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    DYNAMIC_SHARED(shared);
    u16* query = (u16*)shared;         // [64][WIDTH]
    u16* key = query + 64 * WIDTH;     // [KEYS][WIDTH]
    u16* value = key + KEYS * WIDTH;   // [KEYS][WIDTH]

    auto copy_tile = [&](u16* target, const u16* cache, int start) {
        for (int i = threadIdx.x; i < KEYS * (HEAD_DIM / 8); i += 128) {
            const int row = i / (HEAD_DIM / 8), column = i % (HEAD_DIM / 8) * 8, at = start + row;
            const bool valid = at < last;
            const i64 block = valid ? table[at / block_size] : 0;
            const i64 offset = ((block * kv_heads + kv_head) * block_size + (valid ? at % block_size : 0)) * HEAD_DIM + column;
            copy_async(target + row * WIDTH + column, cache + offset, valid);
        }
        commit_copies();
    };

    const int begin = (window ? max(0, position - window + 1) : 0) / KEYS * KEYS;
    copy_tile(key, keys, begin);
    for (int i = threadIdx.x; i < 64 * (HEAD_DIM / 2); i += 128) {
        const int row = i / (HEAD_DIM / 2), column = i % (HEAD_DIM / 2) * 2;
        u32 packed = 0;
        if (row < tokens * group) {
            const float* source = q + (i64)(first_token + row / group) * q_stride + (kv_head * group + row % group) * HEAD_DIM + column;
            packed = pack_bf16(source[0], source[1]);
        }
        *(u32*)(query + row * WIDTH + column) = packed;
    }

    // Lane l has rows l/4 and l/4+8 of its warp's 16.
    int newest[2];
    float top[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f}, out[HEAD_DIM / 8][4];
#pragma unroll
    for (int r = 0; r < 2; r++) newest[r] = position + min((warp * 16 + lane / 4 + 8 * r) / group, tokens - 1);
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[n][i] = 0.0f;

    for (int start = begin; start < last; start += KEYS) {
        wait_copies<0>();
        __syncthreads();  // the keys are here, and nobody reads the values before them
        copy_tile(value, values, start);
        float scores[KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) scores[n][i] = 0.0f;
#pragma unroll
        for (int k = 0; k < HEAD_DIM; k += 16) {
            u32 a[4];
            load_matrices(a, query + (warp * 16 + lane % 16) * WIDTH + k + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                u32 b[4];  // of positions 16n to 16n+7: b[0], b[1]; of the next eight: b[2], b[3]
                load_matrices(b, key + (n * 16 + lane / 16 * 8 + lane % 8) * WIDTH + k + lane / 8 % 2 * 8);
                mma(scores[2 * n], a, b[0], b[1]);
                mma(scores[2 * n + 1], a, b[2], b[3]);
            }
        }
        float peak[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int at = start + n * 8 + lane % 4 * 2 + i % 2, visible = newest[i / 2];
                float score = scores[n][i];
                if (cap > 0.0f) score = cap * tanhf(score / cap);
                scores[n][i] = score = at <= visible && (!window || at > visible - window) ? score : LOWEST;
                peak[i / 2] = fmaxf(peak[i / 2], score);
            }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(FULL, peak[r], 1));
            peak[r] = fmaxf(peak[r], __shfl_xor_sync(FULL, peak[r], 2));
            const float keep = __expf(top[r] - peak[r]);
            top[r] = peak[r];
            sum[r] *= keep;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) out[n][2 * r] *= keep, out[n][2 * r + 1] *= keep;
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = scores[n][i] > 0.5f * LOWEST ? __expf(scores[n][i] - top[i / 2]) : 0.0f;
                scores[n][i] = bf16_to_float(float_to_bf16(p));  // what is added up is what multiplies the values
                sum[i / 2] += scores[n][i];
            }
        wait_copies<0>();
        __syncthreads();  // the values are here, and nobody reads the keys
        if (start + KEYS < last) copy_tile(key, keys, start + KEYS);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const u32 a[4] = {pack_bf16(scores[2 * k][0], scores[2 * k][1]), pack_bf16(scores[2 * k][2], scores[2 * k][3]),
                              pack_bf16(scores[2 * k + 1][0], scores[2 * k + 1][1]), pack_bf16(scores[2 * k + 1][2], scores[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++) {
                u32 b[4];
                load_matrices_transposed(b, value + (k * 16 + lane % 16) * WIDTH + n * 16 + lane / 16 * 8);
                mma(out[2 * n], a, b[0], b[1]);
                mma(out[2 * n + 1], a, b[2], b[3]);
            }
        }
    }
    wait_copies<0>();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(FULL, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL, sum[r], 2);
        const int row = warp * 16 + lane / 4 + 8 * r;
        if (row >= tokens * group) continue;
        const i64 at = (i64)(first_token + row / group) * out_stride + (kv_head * group + row % group) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            const float low = out[n][2 * r] / sum[r], high = out[n][2 * r + 1] / sum[r];
            if (out_f32) *(float2*)(out_f32 + at + 8 * n) = make_float2(low, high);
            if (out_bf16) *(u32*)(out_bf16 + at + 8 * n) = pack_bf16(low, high);
        }
    }
}
