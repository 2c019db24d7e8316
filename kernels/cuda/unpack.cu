// Rows of weights as floats: embeddings, and whole matrices for products in bfloat16. Macros: those of weights.cuh.
// A lane decodes a block of 32 columns. Lanes exchange them in shared memory, so that a warp writes 512 consecutive bytes at a time.
#include "weights.cuh"

// A row of the matrix for each token, times `scale`, in whole blocks. A token that is not in the matrix gives zeros.
extern "C" __global__ void __launch_bounds__(128) embedding(
    const u8* weights, int rows, int blocks, const int* tokens, float scale, float* out, int out_stride, const int* count
) {
    let_next_start();
    wait_for_previous();
    __shared__ float4 room[4][32][9];  // of a warp: [block][32 columns, and four that spread blocks over the banks]
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= *count) return;
    const int token = tokens[row];
    const bool known = token >= 0 && token < rows;
    const Matrix m = matrix_at(weights, rows, blocks);
    float4* target = (float4*)(out + (i64)row * out_stride);
    for (int first = warp * 32; first < blocks; first += blockDim.x) {
        if (known && first + lane < blocks) {
            float v[32];
            unpack(load_raw(m, token, first + lane), v);
#pragma unroll
            for (int i = 0; i < 8; i++)
                room[warp][lane][i] = make_float4(v[4 * i] * scale, v[4 * i + 1] * scale, v[4 * i + 2] * scale, v[4 * i + 3] * scale);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int block = 4 * i + lane / 8;
            if (first + block >= blocks) continue;
            target[first * 8 + 32 * i + lane] = known ? room[warp][block][lane % 8] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        __syncwarp();
    }
}

// The matrix in bfloat16 [rows][blocks * 32].
extern "C" __global__ void __launch_bounds__(256) dequantize(const u8* weights, int rows, int blocks, u16* out) {
    let_next_start();
    wait_for_previous();
    __shared__ uint4 room[8][128];  // of a warp: piece i of block b at 4 b + (i ^ b / 2 % 4), which spreads both ways over the banks
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 first = ((i64)blockIdx.x * 8 + warp) * 32, index = first + lane, end = (i64)rows * blocks;
    const Matrix m = matrix_at(weights, rows, blocks);
    if (index < end) {
        float values[32];
        unpack(load_raw(m, 0, (int)index), values);  // rows follow each other in every plane
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* v = values + 8 * i;
            room[warp][4 * lane + (i ^ lane / 2 % 4)] =
                make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int block = 8 * i + lane / 4;
        if (first + block < end) ((uint4*)out)[first * 4 + 32 * i + lane] = room[warp][4 * block + (lane % 4 ^ block / 2 % 4)];
    }
}
