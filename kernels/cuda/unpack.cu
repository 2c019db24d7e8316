// Rows of weights as floats: embeddings, and whole matrices for matmul_bf16. Macros: those of weights.cuh.
#include "weights.cuh"

// A row of the matrix for each token, times `scale`. A token that is not in the matrix gives zeros.
extern "C" __global__ void embedding(
    const u8* weights, int rows, int blocks, const int* tokens, float scale, float* out, int out_stride, int columns, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int row = blockIdx.x;
    if (row >= *count) return;
    const int token = tokens[row];
    const Matrix m = matrix_at(weights, rows, blocks);
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
        float values[32];
        const bool known = token >= 0 && token < rows;
        if (known) unpack(load_raw(m, token, b), values);
        for (int i = 0; i < 32; i++)
            if (b * 32 + i < columns) out[(i64)row * out_stride + b * 32 + i] = known ? values[i] * scale : 0.0f;
    }
}

// The matrix in bfloat16 [rows][blocks * 32].
extern "C" __global__ void dequantize(const u8* weights, int rows, int blocks, u16* out) {
    let_next_start();
    wait_for_previous();
    const Matrix m = matrix_at(weights, rows, blocks);
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 index = (i64)blockIdx.x * blockDim.x + threadIdx.x; index < (i64)rows * blocks; index += step) {
        float values[32];
        unpack(load_raw(m, (int)(index / blocks), (int)(index % blocks)), values);
        uint4* target = (uint4*)(out + index * 32);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* v = values + 8 * i;
            target[i] = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        }
    }
}
