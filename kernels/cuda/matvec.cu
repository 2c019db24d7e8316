// Products of weights and the few rows of a decoding step: every weight is read once, for all rows, as 16 bytes of a lane.
// Macros: those of weights.cuh, TOKENS (most rows), ROWS (of the matrix, for each warp), and what the entry points need.
#include "weights.cuh"

struct Inputs {
    const float* f32;
    const i8* q8;
    const float2* scales;
    int stride;
};

// sums[r][t] += weights[row + r] . x[t], in every lane. Rows from `live` on are not read.
template <int R, int T>
__device__ __forceinline__ void dot_rows(float (&sums)[R][T], const Matrix& m, int row, const Inputs& x, i64 first, int live) {
    const int lane = threadIdx.x % 32;
    int rows[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        rows[r] = min(row + r, m.rows - 1);
#pragma unroll
        for (int t = 0; t < T; t++) sums[r][t] = 0.0f;
    }
#if FLOAT_BYTES
    const int piece = 16 / FLOAT_BYTES;  // columns in 16 bytes
    const int pieces = m.blocks * 32 / piece;
    for (int p = lane; p < pieces; p += 32) {
        uint4 words[R];
#pragma unroll
        for (int r = 0; r < R; r++) words[r] = ((const uint4*)(m.base + (i64)rows[r] * m.blocks * 32 * FLOAT_BYTES))[p];
        float w[R][piece];
#pragma unroll
        for (int r = 0; r < R; r++) floats_of(words[r], w[r]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            if (t < live) {
                const float4* source = (const float4*)(x.f32 + (first + t) * x.stride + p * piece);
                float a[piece];
#pragma unroll
                for (int i = 0; i < piece / 4; i++) {
                    float4 v = source[i];
                    a[4 * i] = v.x, a[4 * i + 1] = v.y, a[4 * i + 2] = v.z, a[4 * i + 3] = v.w;
                }
#pragma unroll
                for (int r = 0; r < R; r++)
#pragma unroll
                    for (int i = 0; i < piece; i++) sums[r][t] += w[r][i] * a[i];
            }
        }
    }
#else
    for (int b = lane; b < m.blocks; b += 32) {
        Raw raw[R];
#pragma unroll
        for (int r = 0; r < R; r++) raw[r] = load_raw(m, rows[r], b);
        Block blocks[R];
#pragma unroll
        for (int r = 0; r < R; r++) blocks[r] = decode(raw[r]);
#pragma unroll
        for (int t = 0; t < T; t++) {
            if (t < live) {
                i64 at = (first + t) * (x.stride / 32) + b;
                const int4* source = (const int4*)(x.q8 + at * 32);
                int4 u = source[0], v = source[1];
                int a[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
                float2 scale = x.scales[at];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const Block& k = blocks[r];
                    float part = 0.0f;
#pragma unroll
                    for (int h = 0; h < HALVES; h++) {
                        int dot = 0, sum = 0;
#pragma unroll
                        for (int i = h * 8 / HALVES; i < (h + 1) * 8 / HALVES; i++) {
                            dot = __dp4a(k.quants[i], a[i], dot);
                            if (HAS_MINIMUM && HALVES == 2) sum = __dp4a(0x01010101, a[i], sum);
                        }
                        part += k.scale[h] * (scale.x * (float)dot);
                        if (HAS_MINIMUM) part += k.minimum[h] * (HALVES == 2 ? scale.x * (float)sum : scale.y);
                    }
                    sums[r][t] += part;
                }
            }
        }
    }
#endif
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
        for (int t = 0; t < T; t++) sums[r][t] = warp_sum(sums[r][t]);
}

// out = x @ weights.T, or out += ...; a warp makes ROWS columns of out. blockIdx.y counts groups of TOKENS rows of x.
extern "C" __global__ void matvec(
    const u8* weights, int rows, int blocks, const float* x_f32, const i8* x_q8, const float2* x_scales, int x_stride, float* out,
    int out_stride, int accumulate, const int* count
) {
    const i64 first = (i64)blockIdx.y * TOKENS;
    const int live = min(*count - (int)first, TOKENS);
    const int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (live <= 0 || row >= rows) return;
    float sums[ROWS][TOKENS];
    dot_rows<ROWS, TOKENS>(sums, matrix_at(weights, rows, blocks), row, Inputs{x_f32, x_q8, x_scales, x_stride}, first, live);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if ((r * TOKENS + t) % 32 == lane && t < live && row + r < rows) {
                float* target = out + (first + t) * out_stride + row + r;
                *target = accumulate ? *target + sums[r][t] : sums[r][t];
            }
}

// activation(x @ gate.T) * (x @ up.T), in every form: a block of 8 warps makes 32 columns.
extern "C" __global__ void gated_matvec(
    const u8* gate, const u8* up, int rows, int blocks, const float* x_f32, const i8* x_q8, const float2* x_scales, int x_stride,
    int kind, ROWS_ARGUMENTS, const int* count
) {
    __shared__ float products[TOKENS][32];
    const i64 first = (i64)blockIdx.y * TOKENS;
    const int live = min(*count - (int)first, TOKENS);
    if (live <= 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Inputs x = {x_f32, x_q8, x_scales, x_stride};
    for (int i = 0; i < 4; i += ROWS) {
        const int column = warp * 4 + i, row = blockIdx.x * 32 + column;
        float gates[ROWS][TOKENS], ups[ROWS][TOKENS];
        if (row < rows) {
            dot_rows<ROWS, TOKENS>(gates, matrix_at(gate, rows, blocks), row, x, first, live);
            dot_rows<ROWS, TOKENS>(ups, matrix_at(up, rows, blocks), row, x, first, live);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if ((r * TOKENS + t) % 32 == lane && t < live)
                    products[t][column + r] = row + r < rows ? activation(kind, gates[r][t]) * ups[r][t] : 0.0f;
    }
    __syncthreads();
    for (int t = warp; t < live; t += 8) emit(ROWS_OUT, first + t, blockIdx.x * 32 + lane, products[t][lane]);
}

// One row for each (token, choice): its expert's product. `shared_x`: a token's choices have one row of x, else each its own.
extern "C" __global__ void expert_matvec(
    const u8* weights, i64 expert_bytes, int rows, int blocks, const float* x_f32, const i8* x_q8, const float2* x_scales, int x_stride,
    int shared_x, float* out, int out_stride, const int* chosen, int top_k, const int* count
) {
    const int choice = blockIdx.y;
    const int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (choice >= *count * top_k || row >= rows) return;
    float sums[ROWS][1];
    const u8* expert = weights + (i64)chosen[choice] * expert_bytes;
    const Inputs x = {x_f32, x_q8, x_scales, x_stride};
    dot_rows<ROWS, 1>(sums, matrix_at(expert, rows, blocks), row, x, shared_x ? choice / top_k : choice, 1);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r == lane && row + r < rows) out[(i64)choice * out_stride + row + r] = sums[r][0];
}
