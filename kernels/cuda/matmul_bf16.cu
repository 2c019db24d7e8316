// Products of bfloat16 weights and hundreds of rows, which is nearly all of a long prompt (sm_80 and later).
// Four warps make a tile of 128 x 128, each 64 x 64 of it, so that 8 matrices loaded from shared memory serve 32 products;
// while they do, the next three pieces of 32 columns are on their way.
#include "tensor_cores.cuh"

#define BM 128  // rows of x
#define BN 128  // rows of weights
#define BK 32
#define WIDTH (BK + 8)  // of a row in shared memory: eight more spread rows over the banks
#define STAGES 4
#define STAGE ((BM + BN) * WIDTH)

// out = x @ weights.T, or out += ...; weights are [rows][columns], columns a multiple of 32. blockIdx.x counts tiles of x, so that
// blocks that run together share their weights.
extern "C" __global__ void __launch_bounds__(128) matmul_bf16(
    const u16* weights, int rows, int columns, const u16* x, int x_stride, float* out, int out_stride, int accumulate, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int live = *count, first_x = blockIdx.x * BM, first_w = blockIdx.y * BN;
    if (first_x >= live) return;
    DYNAMIC_SHARED(shared);
    u16* tiles = (u16*)shared;  // [STAGES]: [BM][WIDTH] of x, [BN][WIDTH] of weights
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_x = warp / 2 * 64, warp_w = warp % 2 * 64;

    // A thread copies 16 bytes of every 32nd row.
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const u16* x_source = x + (i64)(first_x + row) * x_stride + column;
    const u16* w_source = weights + (i64)(first_w + row) * columns + column;
    auto copy = [&](int k, int stage) {
        if (k < columns) {
            u16* target = tiles + stage * STAGE + row * WIDTH + column;
#pragma unroll
            for (int i = 0; i < BM; i += 32) {
                const bool valid = first_x + row + i < live;
                copy_async(target + i * WIDTH, valid ? x_source + (i64)i * x_stride + k : x, valid);
            }
#pragma unroll
            for (int i = 0; i < BN; i += 32) {
                const bool valid = first_w + row + i < rows;
                copy_async(target + (BM + i) * WIDTH, valid ? w_source + (i64)i * columns + k : weights, valid);
            }
        }
        commit_copies();
    };

    float sums[4][8][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][n][j] = 0.0f;
    for (int s = 0; s < STAGES - 1; s++) copy(s * BK, s);
    for (int k = 0, stage = 0; k < columns; k += BK, stage = (stage + 1) % STAGES) {
        wait_copies<STAGES - 2>();
        __syncthreads();  // this stage is here, and nobody reads the one before
        copy(k + (STAGES - 1) * BK, (stage + STAGES - 1) % STAGES);
        const u16* x_tile = tiles + stage * STAGE;
        const u16* w_tile = x_tile + BM * WIDTH;
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            u32 a[4][4], b[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_matrices(a[i], x_tile + (warp_x + i * 16 + lane % 16) * WIDTH + kk + lane / 16 * 8);
                load_matrices(b[i], w_tile + (warp_w + i * 16 + lane / 16 * 8 + lane % 8) * WIDTH + kk + lane / 8 % 2 * 8);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    mma(sums[i][2 * n], a[i], b[n][0], b[n][1]);
                    mma(sums[i][2 * n + 1], a[i], b[n][2], b[n][3]);
                }
        }
    }
    wait_copies<0>();
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int own = first_x + warp_x + i * 16 + lane / 4 + 8 * j;
            if (own >= live) continue;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int made = first_w + warp_w + n * 8 + lane % 4 * 2 + c;
                    if (made >= rows) continue;
                    float* target = out + (i64)own * out_stride + made;
                    const float sum = sums[i][n][2 * j + c];
                    *target = accumulate ? *target + sum : sum;
                }
        }
}
