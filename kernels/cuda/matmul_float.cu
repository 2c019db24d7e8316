// Products of weights and many rows in float32, without tensor cores: for models in float32, and GPUs before sm_80. A tile is 64 x 64.
// Macros: those of weights.cuh. Arguments as in matmul.cu, with x in float32.
#include "weights.cuh"

#define BM 64
#define BN 64
#define BK 32

extern "C" __global__ void __launch_bounds__(256) matmul_float(
    const u8* weights, i64 expert_bytes, int rows, int blocks, const float* x, int x_stride, float* out, int out_stride, int accumulate,
    const int* places, const int* tile_experts, int choices_per_row, const int* count
) {
    let_next_start();
    wait_for_previous();
    __shared__ float a_tile[BK][BM + 4], b_tile[BK][BN + 4];
    const int tile = blockIdx.x, live = *count;
    if (places ? tile >= live : tile * BM >= live) return;
    const Matrix m = matrix_at(places ? weights + tile_experts[tile] * expert_bytes : weights, rows, blocks);
    const int first_row = blockIdx.y * BN;
    auto place = [&](int r) {
        if (places) return places[tile * BM + r];
        return tile * BM + r < live ? tile * BM + r : -1;
    };
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;  // a thread makes rows 4 ty.. of x, rows 4 tx.. of weights
    float sums[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] = 0.0f;
    for (int block = 0; block < blocks; block++) {
        __syncthreads();
        if (threadIdx.x < BN) {
            float values[32];
            unpack(load_raw(m, min(first_row + (int)threadIdx.x, rows - 1), block), values);
#pragma unroll
            for (int i = 0; i < 32; i++) b_tile[i][threadIdx.x] = values[i];
        }
        for (int i = threadIdx.x; i < BM * BK; i += 256) {
            const int r = i / BK, own = place(r);
            a_tile[i % BK][r] = own < 0 ? 0.0f : x[(i64)(places ? own / choices_per_row : own) * x_stride + block * 32 + i % BK];
        }
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < BK; k++) {
            float a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = a_tile[k][ty * 4 + i], b[i] = b_tile[k][tx * 4 + i];
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] += a[i] * b[j];
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int own = place(ty * 4 + i);
        if (own < 0) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int column = first_row + tx * 4 + j;
            if (column >= rows) continue;
            float* target = out + (i64)own * out_stride + column;
            *target = accumulate ? *target + sums[i][j] : sums[i][j];
        }
    }
}
