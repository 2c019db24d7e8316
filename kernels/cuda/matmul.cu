// Products of weights and many rows. Weights are unpacked to bfloat16 in shared memory, and multiplied by tensor cores (sm_80 and later).
// Macros: those of weights.cuh, BM (rows of x in a tile: 32, 64, 128), BN (rows of weights: 64, 128).
// A mixture's tile is of one expert: `places` says which choice each row of the tile is (or -1), `tile_experts` whose weights it takes.
#include "tensor_cores.cuh"
#include "weights.cuh"

#define BK 64
#define WIDTH (BK + 8)  // of a row in shared memory: eight more spread rows over the banks
#define MT (BM / 32)    // fragments of 16 rows of x for each warp: two warps side by side
#define NT (BN / 32)    // fragments of 8 rows of weights: four warps

extern "C" __global__ void __launch_bounds__(256) matmul(
    const u8* weights, i64 expert_bytes, int rows, int blocks, const u16* x, int x_stride, float* out, int out_stride, int accumulate,
    const int* places, const int* tile_experts, int choices_per_row, const int* count
) {
    let_next_start();
    wait_for_previous();
    // Without experts `count` is rows of x; with them, tiles.
    const int tile = blockIdx.x, live = *count;
    if (places ? tile >= live : tile * BM >= live) return;
    DYNAMIC_SHARED(shared);
    u16* a_tiles = (u16*)shared;               // [2][BM][WIDTH]
    u16* b_tile = a_tiles + 2 * BM * WIDTH;    // [BN][WIDTH]
    const Matrix m = matrix_at(places ? weights + tile_experts[tile] * expert_bytes : weights, rows, blocks);
    const int first_row = blockIdx.y * BN, columns = blocks * 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_m = warp / 4 * (BM / 2), warp_n = warp % 4 * (BN / 4);

    auto place = [&](int r) {  // row of out, or -1
        if (places) return places[tile * BM + r];
        return tile * BM + r < live ? tile * BM + r : -1;
    };
    auto copy_x = [&](int k, u16* target) {
        for (int i = threadIdx.x; i < BM * (BK / 8); i += 256) {
            const int r = i / (BK / 8), c = i % (BK / 8) * 8;
            const int own = place(r);
            const bool valid = own >= 0 && k + c < columns;
            const i64 source = valid ? (i64)(places ? own / choices_per_row : own) * x_stride + k + c : 0;
            copy_async(target + r * WIDTH + c, x + source, valid);
        }
        commit_copies();
    };
    // A thread unpacks one block of 32 columns of one row of weights in each step.
    const int b_row = threadIdx.x / 2, b_column = threadIdx.x % 2 * 32;
    const bool unpacks = b_row < BN;
    const int source_row = min(first_row + b_row, rows - 1);
    Raw raw;
    auto fetch = [&](int k) {
        if (unpacks && k + b_column < columns) raw = load_raw(m, source_row, (k + b_column) / 32);
    };
    auto unpack_weights = [&](int k) {
        if (!unpacks) return;
        float values[32];
        if (k + b_column < columns) {
            unpack(raw, values);
        } else {
#pragma unroll
            for (int i = 0; i < 32; i++) values[i] = 0.0f;
        }
        uint4* target = (uint4*)(b_tile + b_row * WIDTH + b_column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* v = values + 8 * i;
            target[i] = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        }
    };

    float sums[MT][NT][4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][n][j] = 0.0f;
    copy_x(0, a_tiles);
    fetch(0);
    for (int k = 0, stage = 0; k < columns; k += BK, stage ^= 1) {
        __syncthreads();  // nobody reads the weights of the last step, nor the rows of the one before
        unpack_weights(k);
        if (k + BK < columns) {
            copy_x(k + BK, a_tiles + (stage ^ 1) * BM * WIDTH);
            fetch(k + BK);
            wait_copies<1>();
        } else {
            wait_copies<0>();
        }
        __syncthreads();
        const u16* a_tile = a_tiles + stage * BM * WIDTH;
#pragma unroll
        for (int kk = 0; kk < BK; kk += 16) {
            u32 a[MT][4];
#pragma unroll
            for (int i = 0; i < MT; i++) load_matrices(a[i], a_tile + (warp_m + i * 16 + lane % 16) * WIDTH + kk + lane / 16 * 8);
#pragma unroll
            for (int n = 0; n < NT / 2; n++) {
                u32 b[4];
                load_matrices(b, b_tile + (warp_n + n * 16 + lane / 16 * 8 + lane % 8) * WIDTH + kk + lane / 8 % 2 * 8);
#pragma unroll
                for (int i = 0; i < MT; i++) {
                    mma(sums[i][2 * n], a[i], b[0], b[1]);
                    mma(sums[i][2 * n + 1], a[i], b[2], b[3]);
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int own = place(warp_m + i * 16 + lane / 4 + 8 * j);
            if (own < 0) continue;
#pragma unroll
            for (int n = 0; n < NT; n++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int column = first_row + warp_n + n * 8 + lane % 4 * 2 + c;
                    if (column >= rows) continue;
                    float* target = out + (i64)own * out_stride + column;
                    const float sum = sums[i][n][2 * j + c];
                    *target = accumulate ? *target + sum : sum;
                }
        }
}
