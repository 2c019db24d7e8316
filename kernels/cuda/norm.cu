// Norms of rows, with the residual addition before them.
// Macros: PIECES (of four columns, to a thread), THREADS, WHOLE (columns are a multiple of 4).
#include "common.cuh"

__device__ __forceinline__ float dot4(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// x += branch, or x += rms_norm(branch) * branch_weight; then out = rms_norm(x) * weight, in every form. A null pointer leaves a part out.
// With `indices` out has one row for each of them, and only those rows of x change.
// All loads are under way before the first is waited for: one row has nothing else to hide them behind.
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(
    float* x, int x_stride, const float* branch, int branch_stride, const float* branch_weight, const float* weight, const int* indices,
    int columns, float epsilon, ROWS_ARGUMENTS, const int* count
) {
    let_next_start();
    __shared__ float room[2][32];
    const int unit = blockIdx.x, rows = *count;
    if (indices && unit >= rows) return wait_for_previous();
    const i64 row = indices ? indices[unit] : unit;
    float* own = x + row * x_stride;
    float4 a[PIECES], b[PIECES], w[PIECES];
#pragma unroll
    for (int p = 0; p < PIECES; p++)
        if (weight) w[p] = load4(weight, (p * THREADS + threadIdx.x) * 4, columns, WHOLE);
    wait_for_previous();
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int i = (p * THREADS + threadIdx.x) * 4;
        a[p] = load4(own, i, columns, WHOLE);
        if (branch) b[p] = load4(branch + row * branch_stride, i, columns, WHOLE);
    }
    if (unit >= rows) return;  // behind the loads, which are of rows that are there
    if (branch) {
        float squares = 0.0f;
#pragma unroll
        for (int p = 0; p < PIECES; p++) squares += dot4(b[p], b[p]);
        const float factor = branch_weight ? 1.0f / sqrtf(block_sum(squares, room[0]) / columns + epsilon) : 1.0f;
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            const int i = (p * THREADS + threadIdx.x) * 4;
            float4 c = {1.0f, 1.0f, 1.0f, 1.0f};
            if (branch_weight) c = load4(branch_weight, i, columns, WHOLE);
            a[p].x += b[p].x * factor * c.x, a[p].y += b[p].y * factor * c.y, a[p].z += b[p].z * factor * c.z, a[p].w += b[p].w * factor * c.w;
            store4(own, i, columns, WHOLE, a[p]);
        }
    }
    if (!weight) return;
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PIECES; p++) squares += dot4(a[p], a[p]);
    const float factor = 1.0f / sqrtf(block_sum(squares, room[1]) / columns + epsilon);
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const float4 y = {a[p].x * factor * w[p].x, a[p].y * factor * w[p].y, a[p].z * factor * w[p].z, a[p].w * factor * w[p].w};
        emit4(ROWS_OUT, unit, (p * THREADS + threadIdx.x) * 4, columns, y);
    }
}
