// What happens to rows between the matrix products.
#include "common.cuh"

// x += branch, or x += rms_norm(branch) * branch_weight; then out = rms_norm(x) * weight, in every form. A null pointer leaves a part out.
// With `indices` out has one row for each of them, and only those rows of x change.
extern "C" __global__ void __launch_bounds__(1024) norm_rows(
    float* x, int x_stride, const float* branch, int branch_stride, const float* branch_weight, const float* weight, const int* indices,
    int columns, float epsilon, ROWS_ARGUMENTS, const int* count
) {
    let_next_start();
    wait_for_previous();
    __shared__ float room[33];
    const int unit = blockIdx.x;
    if (unit >= *count) return;
    const i64 row = indices ? indices[unit] : unit;
    float* own = x + row * x_stride;
    if (branch) {
        const float* added = branch + row * branch_stride;
        float factor = 1.0f;
        if (branch_weight) {
            float squares = 0.0f;
            for (int i = threadIdx.x; i < columns; i += blockDim.x) squares += added[i] * added[i];
            factor = 1.0f / sqrtf(block_sum(squares, room) / columns + epsilon);
        }
        for (int i = threadIdx.x; i < columns; i += blockDim.x) own[i] += branch_weight ? added[i] * factor * branch_weight[i] : added[i];
    }
    if (!weight) return;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) squares += own[i] * own[i];  // each thread reads what it wrote
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / columns + epsilon);
    for (int i = threadIdx.x; i < (columns + 31) / 32 * 32; i += blockDim.x) emit(ROWS_OUT, unit, i, i < columns ? own[i] * factor * weight[i] : 0.0f);
}

// Elementwise operations: blockIdx.y is the row, a thread has one column; what is behind the last column is written as 0.
#define ELEMENT(name, parameters, expression)                                                                                     \
    extern "C" __global__ void name(const float* x, int x_stride, int columns, parameters, ROWS_ARGUMENTS, const int* count) {    \
        let_next_start();                                                                                                         \
        wait_for_previous();                                                                                                      \
        const i64 row = blockIdx.y;                                                                                               \
        const int i = blockIdx.x * blockDim.x + threadIdx.x;                                                                      \
        if (row >= *count || i / 32 * 32 >= columns) return;                                                                   \
        float value = 0.0f;                                                                                                       \
        if (i < columns) {                                                                                                        \
            const float a = x[row * x_stride + i];                                                                                \
            value = expression;                                                                                                   \
        }                                                                                                                         \
        emit(ROWS_OUT, row, i, value);                                                                                            \
    }
#define COMMA ,

ELEMENT(add, const float* y COMMA int y_stride, a + y[row * y_stride + i])
ELEMENT(multiply, const float* y COMMA int y_stride, a * y[row * y_stride + i])
ELEMENT(add_vector, const float* y, a + y[i])
ELEMENT(activate, int kind, activation(kind, a))
ELEMENT(gate, const float* y COMMA int y_stride COMMA int kind, activation(kind, a) * y[row * y_stride + i])
ELEMENT(sigmoid_gate, const float* y COMMA int y_stride, a / (1.0f + expf(-y[row * y_stride])))
ELEMENT(soft_cap, float cap, cap * tanhf(a / cap))
ELEMENT(scale, float factor, a * factor)

// out[i] = x[indices[i]]
extern "C" __global__ void take_rows(const float* x, int x_stride, const int* indices, int columns, ROWS_ARGUMENTS, const int* count) {
    let_next_start();
    wait_for_previous();
    const i64 row = blockIdx.y;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= *count || i / 32 * 32 >= columns) return;
    emit(ROWS_OUT, row, i, i < columns ? x[(i64)indices[row] * x_stride + i] : 0.0f);
}
