// Flash attention (arXiv:2205.14135) on tensor cores over a paged KV cache, for many tokens of a sequence (sm_80 and later).
// Macros: HEAD_DIM (a multiple of 16), GROUP (query heads of a key/value head), BLOCK_SIZE (of the cache, a multiple of 32), SOFT_CAP (0 or 1),
// ROWS (queries of a block: 128, or 64), KEYS (positions in a tile: 64, or 32).
// A block has four warps. Row r of its queries is query head r % GROUP of token r / GROUP of an item.
#include "attention.cuh"
#include "tensor_cores.cuh"

#define WIDTH (HEAD_DIM + 8)  // of a row in shared memory: eight more spread rows over the banks
#define PIECES (HEAD_DIM / 8)  // of 16 bytes, of a row
#define RUN (KEYS * PIECES >= 1024 ? 8 : KEYS * PIECES >= 512 ? 4 : 2)  // rows that a thread copies: they lie in one block of the cache
#define FRAGMENTS (ROWS / 64)  // of 16 queries, in a warp: what is loaded of keys and values serves all of them

// items: [first token, tokens, row of the block table]. q comes scaled. Blocks are started from the last item on: it has most keys.
extern "C" __global__ void __launch_bounds__(128, 2) attention_prefill(
    const float* q, int q_stride, const u16* keys, const u16* values, int kv_heads, const int* positions, const int* items, const int* tables,
    int table_width, int window, float cap, float* out_f32, u16* out_bf16, int out_stride, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int item = *count - 1 - (int)blockIdx.y;
    if (item < 0) return;
    const int kv_head = blockIdx.x, first_head = kv_head * GROUP;
    const int first_token = items[3 * item], rows = items[3 * item + 1] * GROUP;
    const int* table = tables + (i64)items[3 * item + 2] * table_width;
    const int position = positions[first_token], last = position + rows / GROUP;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = warp * (ROWS / 4);
    DYNAMIC_SHARED(shared);
    u16* query = (u16*)shared;          // [ROWS][WIDTH]
    u16* key = query + ROWS * WIDTH;    // [KEYS][WIDTH]
    u16* value = key + KEYS * WIDTH;    // [KEYS][WIDTH]

    auto copy_tile = [&](u16* target, const u16* cache, int start) {
        for (int i = threadIdx.x; i < KEYS / RUN * PIECES; i += 128) {
            const int row = i / PIECES * RUN, column = i % PIECES * 8, at = start + row, left = last - at;
            const i64 block = left > 0 ? table[at / BLOCK_SIZE] : 0;
            const u16* source = cache + ((block * kv_heads + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE) * HEAD_DIM + column;
            u16* own = target + row * WIDTH + column;
            if (left >= RUN) {
#pragma unroll
                for (int j = 0; j < RUN; j++) copy_async(own + j * WIDTH, source + j * HEAD_DIM, true);
            } else {
#pragma unroll
                for (int j = 0; j < RUN; j++) copy_async(own + j * WIDTH, source + j * HEAD_DIM, j < left);
            }
        }
        commit_copies();
    };

    const int begin = (window ? max(0, position - window + 1) : 0) / 32 * 32;  // where a block of the cache may start
    copy_tile(key, keys, begin);
    for (int i = threadIdx.x; i < ROWS * (HEAD_DIM / 4); i += 128) {
        const int row = i / (HEAD_DIM / 4), column = i % (HEAD_DIM / 4) * 4;
        uint2 packed = {0, 0};
        if (row < rows) {
            const float4 x = *(const float4*)(q + (i64)(first_token + row / GROUP) * q_stride + (first_head + row % GROUP) * HEAD_DIM + column);
            packed = {pack_bf16(x.x * LOG2E, x.y * LOG2E), pack_bf16(x.z * LOG2E, x.w * LOG2E)};  // scores are logarithms to base 2
        }
        *(uint2*)(query + row * WIDTH + column) = packed;
    }

    // Lane l has rows l/4 and l/4+8 of each fragment; the sums are of its own columns, until the end.
    float top[FRAGMENTS][2], sum[FRAGMENTS][2], out[FRAGMENTS][HEAD_DIM / 8][4];
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++) {
        top[m][0] = top[m][1] = 0.5f * LOWEST;  // above what is masked, whose exponentials are 0
        sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[m][n][i] = 0.0f;
    }
    // Positions of the warp's first row and of its last; a warp without rows sees none.
    const int oldest = position + first_row / GROUP;
    const int newest = first_row < rows ? position + (min(rows, first_row + ROWS / 4) - 1) / GROUP : -1;

    for (int start = begin; start < last; start += KEYS) {
        const bool seen = start <= newest;  // by some row of the warp
        wait_copies<0>();
        __syncthreads();  // the keys are here, and nobody reads the values before them
        copy_tile(value, values, start);
        u32 p[FRAGMENTS][KEYS / 16][4];
        if (seen) {
            float scores[FRAGMENTS][KEYS / 8][4];
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) scores[m][n][i] = 0.0f;
#pragma unroll
            for (int k = 0; k < HEAD_DIM; k += 16) {
                u32 a[FRAGMENTS][4];
#pragma unroll
                for (int m = 0; m < FRAGMENTS; m++) load_matrices(a[m], query + (first_row + 16 * m + lane % 16) * WIDTH + k + lane / 16 * 8);
#pragma unroll
                for (int n = 0; n < KEYS / 16; n++) {
                    u32 b[4];  // of positions 16n to 16n+7: b[0], b[1]; of the next eight: b[2], b[3]
                    load_matrices(b, key + (n * 16 + lane / 16 * 8 + lane % 8) * WIDTH + k + lane / 8 % 2 * 8);
#pragma unroll
                    for (int m = 0; m < FRAGMENTS; m++) {
                        mma(scores[m][2 * n], a[m], b[0], b[1]);
                        mma(scores[m][2 * n + 1], a[m], b[2], b[3]);
                    }
                }
            }
#if SOFT_CAP
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) scores[m][n][i] = capped(scores[m][n][i], cap);
#endif
            if (start + KEYS - 1 > oldest || (window && start <= newest - window)) {
#pragma unroll
                for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const int row = first_row + 16 * m + 8 * r + lane / 4, visible = min(position + row / GROUP, last - 1);
#pragma unroll
                        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                            for (int i = 0; i < 2; i++) {
                                const int at = start + n * 8 + lane % 4 * 2 + i;
                                if (at > visible || (window && at <= visible - window)) scores[m][n][2 * r + i] = LOWEST;
                            }
                    }
            }
            float peak[FRAGMENTS][2];
            bool higher = false;
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float own = LOWEST;
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++) own = fmaxf(own, fmaxf(scores[m][n][2 * r], scores[m][n][2 * r + 1]));
                    own = fmaxf(own, __shfl_xor_sync(FULL, own, 1));
                    peak[m][r] = fmaxf(own, __shfl_xor_sync(FULL, own, 2));
                    higher |= peak[m][r] > top[m][r] + SLACK;
                }
            if (__any_sync(FULL, higher)) {
#pragma unroll
                for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const float next = fmaxf(top[m][r], peak[m][r]), keep = exp2f(top[m][r] - next);
                        top[m][r] = next;
                        sum[m][r] *= keep;
#pragma unroll
                        for (int n = 0; n < HEAD_DIM / 8; n++) out[m][n][2 * r] *= keep, out[m][n][2 * r + 1] *= keep;
                    }
            }
#pragma unroll
            for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int r = 0; r < 2; r++) {
                        const float low = exp2f(scores[m][n][2 * r] - top[m][r]), high = exp2f(scores[m][n][2 * r + 1] - top[m][r]);
                        sum[m][r] += low + high;
                        p[m][n / 2][n % 2 * 2 + r] = pack_bf16(low, high);
                    }
        }
        wait_copies<0>();
        __syncthreads();  // the values are here, and nobody reads the keys
        if (start + KEYS < last) copy_tile(key, keys, start + KEYS);
        if (!seen) continue;
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 16; n++) {
                u32 b[4];
                load_matrices_transposed(b, value + (k * 16 + lane % 16) * WIDTH + n * 16 + lane / 16 * 8);
#pragma unroll
                for (int m = 0; m < FRAGMENTS; m++) {
                    mma(out[m][2 * n], p[m][k], b[0], b[1]);
                    mma(out[m][2 * n + 1], p[m][k], b[2], b[3]);
                }
            }
    }
    wait_copies<0>();
#pragma unroll
    for (int m = 0; m < FRAGMENTS; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[m][r] += __shfl_xor_sync(FULL, sum[m][r], 1);
            sum[m][r] += __shfl_xor_sync(FULL, sum[m][r], 2);
            const int row = first_row + 16 * m + 8 * r + lane / 4;
            if (row >= rows) continue;
            const float factor = 1.0f / sum[m][r];
            const i64 at = (i64)(first_token + row / GROUP) * out_stride + (first_head + row % GROUP) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
                const float low = out[m][n][2 * r] * factor, high = out[m][n][2 * r + 1] * factor;
                if (out_f32) *(float2*)(out_f32 + at + 8 * n) = make_float2(low, high);
                if (out_bf16) *(u32*)(out_bf16 + at + 8 * n) = pack_bf16(low, high);
            }
        }
}
