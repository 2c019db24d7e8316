// Products of weights and the few rows of a decoding step: every weight is read once, for all rows, as 16 bytes of a lane.
// Macros: those of weights.cuh, TOKENS (most rows), ROWS (of the matrix, for each warp), and what the entry points need.
#include "weights.cuh"

struct Inputs {
    const float* f32;
    const i8* q8;
    const float2* scales;
    int stride;
};

// Memory answers after some 700 ns, so that an SM needs 20 KB on their way: a lane asks for this many words of each
// row, in all, before it computes.
#if FLOAT_BYTES
#define WORDS_AHEAD 32
#else
#define WORDS_AHEAD (BITS + HIGH > 4 ? 36 : 32)
#endif

// sums[n][t] = row rows[n] of matrix m[n] . x[first + t], in every lane. Rows of x from `live` on are not read. The first weights are on
// their way before x is waited for.
template <int N, int T>
__device__ __forceinline__ void dot_rows(
    float (&sums)[N][T], const Matrix (&m)[N], const int (&rows)[N], const Inputs& x, i64 first, int live
) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < T; t++) sums[n][t] = 0.0f;
#if FLOAT_BYTES
    const int piece = 16 / FLOAT_BYTES;  // columns in 16 bytes
    const int pieces = m[0].blocks * 32 / piece;
    const int ahead = WORDS_AHEAD / (4 * N);
    uint4 words[ahead][N];
    auto fetch = [&](int begin) {
#pragma unroll
        for (int u = 0; u < ahead; u++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4* source = (const uint4*)(m[n].base + (i64)rows[n] * m[n].blocks * 32 * FLOAT_BYTES);
                if (begin + 32 * u < pieces) words[u][n] = source[begin + 32 * u];
            }
    };
    auto multiply = [&](int begin) {
#pragma unroll
        for (int u = 0; u < ahead; u++) {
            const int p = begin + 32 * u;
            if (p >= pieces) break;
            float w[N][piece];
#pragma unroll
            for (int n = 0; n < N; n++) floats_of(words[u][n], w[n]);
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (t >= live) break;
                const float4* source = (const float4*)(x.f32 + (first + t) * x.stride + p * piece);
                float a[piece];
#pragma unroll
                for (int i = 0; i < piece / 4; i++) {
                    float4 v = source[i];
                    a[4 * i] = v.x, a[4 * i + 1] = v.y, a[4 * i + 2] = v.z, a[4 * i + 3] = v.w;
                }
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int i = 0; i < piece; i++) sums[n][t] += w[n][i] * a[i];
            }
        }
    };
    const int end = pieces;
#else
    const int fit = WORDS_AHEAD / ((BITS + HIGH) * N), ahead = fit < 1 ? 1 : fit > 4 ? 4 : fit;  // 4 are a row of 4096 columns
    Raw raw[ahead][N];
    auto fetch = [&](int begin) {
#pragma unroll
        for (int u = 0; u < ahead; u++)
#pragma unroll
            for (int n = 0; n < N; n++)
                if (begin + 32 * u < m[0].blocks) raw[u][n] = load_raw(m[n], rows[n], begin + 32 * u);
    };
    auto multiply = [&](int begin) {
#pragma unroll
        for (int u = 0; u < ahead; u++) {
            const int b = begin + 32 * u;
            if (b >= m[0].blocks) break;
            Block blocks[N];
#pragma unroll
            for (int n = 0; n < N; n++) blocks[n] = decode(raw[u][n]);
#pragma unroll
            for (int t = 0; t < T; t++) {
                if (t >= live) break;
                const i64 at = (first + t) * (x.stride / 32) + b;
                const int4* source = (const int4*)(x.q8 + at * 32);
                const int4 low = source[0], high = source[1];
                const int a[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                const float2 scale = x.scales[at];
#pragma unroll
                for (int n = 0; n < N; n++) {
                    const Block& k = blocks[n];
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
                    sums[n][t] += part;
                }
            }
        }
    };
    const int end = m[0].blocks;
#endif
    fetch(lane);
    wait_for_previous();
    multiply(lane);
    for (int begin = lane + 32 * ahead; begin < end; begin += 32 * ahead) {
        fetch(begin);
        multiply(begin);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int t = 0; t < T; t++) sums[n][t] = warp_sum(sums[n][t]);
}

// out = x @ weights.T, or out += ..., for up to three matrices of one width, the queries', keys' and values': a warp makes ROWS columns
// of one of them. blockIdx.y counts groups of TOKENS rows of x.
extern "C" __global__ void matvec(
    const u8* weights0, int rows0, float* out0, int stride0, const u8* weights1, int rows1, float* out1, int stride1, const u8* weights2,
    int rows2, float* out2, int stride2, int blocks, const float* x_f32, const i8* x_q8, const float2* x_scales, int x_stride,
    int accumulate, const int* count
) {
    let_next_start();
    const i64 first = (i64)blockIdx.y * TOKENS;
    const int live = min(*count - (int)first, TOKENS);
    const u8* weights = weights0;
    float* out = out0;
    int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS, rows = rows0, stride = stride0;
    if (row >= rows) {
        row -= (rows + ROWS - 1) / ROWS * ROWS;
        weights = weights1, rows = rows1, out = out1, stride = stride1;
    }
    if (row >= rows) {
        row -= (rows + ROWS - 1) / ROWS * ROWS;
        weights = weights2, rows = rows2, out = out2, stride = stride2;
    }
    if (live <= 0 || row >= rows) return wait_for_previous();
    float sums[ROWS][TOKENS];
    Matrix matrices[ROWS];
    int own[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) matrices[r] = matrix_at(weights, rows, blocks), own[r] = min(row + r, rows - 1);
    dot_rows<ROWS, TOKENS>(sums, matrices, own, Inputs{x_f32, x_q8, x_scales, x_stride}, first, live);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if ((r * TOKENS + t) % 32 == lane && t < live && row + r < rows) {
                float* target = out + (first + t) * stride + row + r;
                *target = accumulate ? *target + sums[r][t] : sums[r][t];
            }
}

// activation(x @ gate.T) * (x @ up.T), in every form: a block of 4 or 8 warps makes 32 columns.
extern "C" __global__ void gated_matvec(
    const u8* gate, const u8* up, int rows, int blocks, const float* x_f32, const i8* x_q8, const float2* x_scales, int x_stride,
    int kind, ROWS_ARGUMENTS, const int* count
) {
    let_next_start();
    __shared__ float products[TOKENS][32];
    const i64 first = (i64)blockIdx.y * TOKENS;
    const int live = min(*count - (int)first, TOKENS);
    if (live <= 0) return wait_for_previous();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const Inputs x = {x_f32, x_q8, x_scales, x_stride};
    const Matrix gates = matrix_at(gate, rows, blocks), ups = matrix_at(up, rows, blocks);
    const Matrix matrices[4] = {gates, gates, ups, ups};
    for (int column = 2 * warp; column < 32; column += 2 * warps) {
        const int row = blockIdx.x * 32 + column;
        float sums[4][TOKENS];
        if (row < rows) {
            const int next = min(row + 1, rows - 1), own[4] = {row, next, row, next};
            dot_rows<4, TOKENS>(sums, matrices, own, x, first, live);
        }
        wait_for_previous();
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if ((r * TOKENS + t) % 32 == lane && t < live)
                    products[t][column + r] = row + r < rows ? activation(kind, sums[r][t]) * sums[r + 2][t] : 0.0f;
    }
    __syncthreads();
    for (int t = warp; t < live; t += warps) emit(ROWS_OUT, first + t, blockIdx.x * 32 + lane, products[t][lane]);
}

// One row for each (token, choice): its expert's product. `shared_x`: a token's choices have one row of x, else each its own.
extern "C" __global__ void expert_matvec(
    const u8* weights, i64 expert_bytes, int rows, int blocks, const float* x_f32, const i8* x_q8, const float2* x_scales, int x_stride,
    int shared_x, float* out, int out_stride, const int* chosen, int top_k, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int choice = blockIdx.y;
    const int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (choice >= *count * top_k || row >= rows) return;
    float sums[ROWS][1];
    const u8* expert = weights + (i64)chosen[choice] * expert_bytes;
    Matrix matrices[ROWS];
    int own[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) matrices[r] = matrix_at(expert, rows, blocks), own[r] = min(row + r, rows - 1);
    dot_rows<ROWS, 1>(sums, matrices, own, Inputs{x_f32, x_q8, x_scales, x_stride}, shared_x ? choice / top_k : choice, 1);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (r == lane && row + r < rows) out[(i64)choice * out_stride + row + r] = sums[r][0];
}
