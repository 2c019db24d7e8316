// Elementwise operations on rows. A thread has four consecutive columns.
#include "common.cuh"

// blockIdx.y is the row. `a` is of x and `b` of a second row, if there is one; what is behind the last column is
// written as 0.
#define ELEMENT(name, parameters, second, expression)                                                                             \
    extern "C" __global__ void name(const float* x, int x_stride, int columns, parameters, ROWS_ARGUMENTS, const int* count) {    \
        let_next_start();                                                                                                         \
        wait_for_previous();                                                                                                      \
        const i64 row = blockIdx.y;                                                                                               \
        const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;                                                                \
        if (row >= *count || i / 128 * 128 >= columns) return;                                                                    \
        const float* other = second;                                                                                              \
        const bool whole = columns % 4 == 0 && x_stride % 4 == 0;                                                                 \
        const float4 first = load4(x + row * x_stride, i, columns, whole), next = other ? load4(other, i, columns, whole) : first; \
        const float as[4] = {first.x, first.y, first.z, first.w}, bs[4] = {next.x, next.y, next.z, next.w};                       \
        float made[4];                                                                                                            \
        _Pragma("unroll") for (int j = 0; j < 4; j++) {                                                                           \
            const float a = as[j], b = bs[j];                                                                                     \
            made[j] = i + j < columns ? expression : 0.0f;                                                                        \
        }                                                                                                                         \
        emit4(ROWS_OUT, row, i, columns, make_float4(made[0], made[1], made[2], made[3]));                                        \
    }
#define COMMA ,
#define NONE nullptr

ELEMENT(add, const float* y COMMA int y_stride, y + row * y_stride, a + b)
ELEMENT(multiply, const float* y COMMA int y_stride, y + row * y_stride, a * b)
ELEMENT(add_vector, const float* y, y, a + b)
ELEMENT(activate, int kind, NONE, activation(kind, a))
ELEMENT(gate, const float* y COMMA int y_stride COMMA int kind, y + row * y_stride, activation(kind, a) * b)
ELEMENT(sigmoid_gate, const float* y COMMA int y_stride, NONE, a / (1.0f + expf(-y[row * y_stride])))
ELEMENT(soft_cap, float cap, NONE, cap * tanhf(a / cap))
ELEMENT(scale, float factor, NONE, a * factor)

// out[i] = x[indices[i]]
extern "C" __global__ void take_rows(const float* x, int x_stride, const int* indices, int columns, ROWS_ARGUMENTS, const int* count) {
    let_next_start();
    wait_for_previous();
    const i64 row = blockIdx.y;
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (row >= *count || i / 128 * 128 >= columns) return;
    emit4(ROWS_OUT, row, i, columns, load4(x + (i64)indices[row] * x_stride, i, columns, columns % 4 == 0));
}
