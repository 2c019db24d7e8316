// Products of bfloat16 weights and hundreds of rows on Hopper, by wgmma (sm_90a alone); the same as matmul_bf16, and twice as fast.
// Macros: BN (rows of weights in a tile: 128, 256).
// Two warpgroups make a tile of 128 x BN, 64 rows of x each, straight from shared memory. A warpgroup's products of one stage are under
// way while the next are issued; the copies of two stages ahead go where the products of two stages before have read.
#include "warpgroup.cuh"

#define BM 128  // rows of x
#define BK TILE_K
#define STAGES (BN == 256 ? 4 : 6)  // 192 KB
#define STAGE ((BM + BN) * BK)

// Sums of a tile, as fragments (mma in tensor_cores.cuh): rows of x from `first_x` on as far as `live`, times BN rows of weights, which are
// [columns] each, a multiple of 32. `row_at(i)` is row i of the tile's weights, or a null pointer.
template <class RowAt>
__device__ __forceinline__ void multiply_tile(float (&sums)[BN / 2], u8* shared, const u16* x, int x_stride, int first_x, int live, int columns, RowAt row_at) {
    u16* tiles = (u16*)(shared + (-(u64)shared & 1023));  // [STAGES]: [BM][BK] of x, [BN][BK] of weights
    const int half = threadIdx.x / 128;

    // A thread copies a piece of 16 bytes of every 32nd row.
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    const u16 *x_rows[BM / 32], *w_rows[BN / 32];
#pragma unroll
    for (int i = 0; i < BM / 32; i++) x_rows[i] = first_x + row + 32 * i < live ? x + (i64)(first_x + row + 32 * i) * x_stride : nullptr;
#pragma unroll
    for (int i = 0; i < BN / 32; i++) w_rows[i] = row_at(row + 32 * i);
    auto copy = [&](int k, int stage) {
        if (k < columns) {
            u16* target = swizzled(tiles + stage * STAGE, row, piece);
            const int column = k + piece * 8;
            const bool inside = column < columns;
#pragma unroll
            for (int i = 0; i < BM / 32; i++) copy_async(target + 32 * i * BK, inside && x_rows[i] ? x_rows[i] + column : x, inside && x_rows[i]);
#pragma unroll
            for (int i = 0; i < BN / 32; i++)
                copy_async(target + (BM + 32 * i) * BK, inside && w_rows[i] ? w_rows[i] + column : x, inside && w_rows[i]);
        }
        commit_copies();
    };

#pragma unroll
    for (int i = 0; i < BN / 2; i++) sums[i] = 0.0f;
    for (int s = 0; s < STAGES - 2; s++) copy(s * BK, s);
    for (int k = 0, stage = 0; k < columns; k += BK, stage = (stage + 1) % STAGES) {
        wait_copies<STAGES - 3>();
        publish_writes();
        __syncthreads();  // this stage is here, and nobody reads the one before the last
        const u16* x_tile = tiles + stage * STAGE + half * 64 * BK;
        const u64 a = tile_descriptor(x_tile), b = tile_descriptor(tiles + stage * STAGE + BM * BK);
        begin_products();
#pragma unroll
        for (int kk = 0; kk < BK / 16; kk++) product(sums, a + 2 * kk, b + 2 * kk);
        commit_products();
        copy(k + (STAGES - 2) * BK, (stage + STAGES - 2) % STAGES);
        wait_products<1>();
    }
    wait_products<0>();
    settle(sums);
    wait_copies<0>();
}

// out = x @ weights.T, or out += ...; weights are [rows][columns]. blockIdx.x counts tiles of x, so that blocks that run together share
// their weights.
extern "C" __global__ void __launch_bounds__(256) matmul_hopper(
    const u16* weights, int rows, int columns, const u16* x, int x_stride, float* out, int out_stride, int accumulate, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int live = *count, first_x = blockIdx.x * BM, first_w = blockIdx.y * BN;
    if (first_x >= live) return;
    DYNAMIC_SHARED(shared);
    float sums[BN / 2];
    multiply_tile(sums, shared, x, x_stride, first_x, live, columns, [&](int i) {
        return first_w + i < rows ? weights + (i64)(first_w + i) * columns : nullptr;
    });
    const int lane = threadIdx.x % 32, first = first_x + threadIdx.x / 32 * 16 + lane / 4;
    const bool pairs = out_stride % 2 == 0;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int own = first + 8 * j;
        if (own >= live) continue;
        float* line = out + (i64)own * out_stride;
#pragma unroll
        for (int n = 0; n < BN / 8; n++) {
            const int made = first_w + n * 8 + lane % 4 * 2;
            float2 sum = make_float2(sums[4 * n + 2 * j], sums[4 * n + 2 * j + 1]);
            if (pairs && made + 1 < rows) {
                float2* target = (float2*)(line + made);
                if (accumulate) sum.x += target->x, sum.y += target->y;
                *target = sum;
            } else {
                if (made < rows) line[made] = accumulate ? line[made] + sum.x : sum.x;
                if (made + 1 < rows) line[made + 1] = accumulate ? line[made + 1] + sum.y : sum.y;
            }
        }
    }
}

// activation(x @ gate.T) * (x @ up.T), as bfloat16: the first half of a tile's rows of weights are the gate's. Columns up to out_stride, which
// is the next multiple of 32, become zeros.
extern "C" __global__ void __launch_bounds__(256) gated_matmul_hopper(
    const u16* gate, const u16* up, int rows, int columns, const u16* x, int x_stride, int kind, u16* out, int out_stride, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int live = *count, first_x = blockIdx.x * BM, first_w = blockIdx.y * (BN / 2);
    if (first_x >= live) return;
    DYNAMIC_SHARED(shared);
    float sums[BN / 2];
    multiply_tile(sums, shared, x, x_stride, first_x, live, columns, [&](int i) {
        const int own = first_w + i % (BN / 2);
        return own < rows ? (i < BN / 2 ? gate : up) + (i64)own * columns : nullptr;
    });
    const int lane = threadIdx.x % 32, first = first_x + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int own = first + 8 * j;
        if (own >= live) continue;
#pragma unroll
        for (int n = 0; n < BN / 16; n++) {
            const int made = first_w + n * 8 + lane % 4 * 2, i = 4 * n + 2 * j;
            const float low = activation(kind, sums[i]) * sums[i + BN / 4], high = activation(kind, sums[i + 1]) * sums[i + 1 + BN / 4];
            if (made < out_stride) *(u32*)(out + (i64)own * out_stride + made) = pack_bf16(low, high);
        }
    }
}
