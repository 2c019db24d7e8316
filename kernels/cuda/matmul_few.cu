// Products of weights and the rows of a batch's decoding step, up to `FEW_ROWS` of linear.py, on tensor cores (sm_80 and later): every weight is read once for
// 8, 16 or 32 rows, from global memory to the registers that a fragment takes it from.
// Macros: those of weights.cuh, TOKENS (8, 16, 32: rows of x for each block), MATRIX_TILES (of 16 rows of weights, for a warp of matmul_few),
// ROW_WARPS (1, 2, 4: warps with other rows of weights, which share x; the rest of eight deal out the columns).
//
// In which order a product's columns come does not matter, so long as it is the same in both: of a chunk of 128, lane l, with c = l % 4, owns the
// columns of block c, of rows l / 4 and l / 4 + 8 of each tile, and gives a fragment four of them at a time. Of x (rows l / 4 of each eight) it
// needs the same columns. What is added in which order depends on neither TOKENS nor the other rows of x: a row's result is the same in every step.
#include "tensor_cores.cuh"
#include "weights.cuh"

#define WARPS 8
#define COLUMN_WARPS (WARPS / ROW_WARPS)
#define GROUPS (TOKENS / 8)                             // of 8 rows of x, a fragment's
#define STAGES 4                                        // of 64 columns of x, for each of COLUMN_WARPS, in shared memory
#define STAGE (TOKENS * 64)
#define STRIDE(tiles) (16 * (tiles) + 4)  // of a row of sums: four more spread a fragment over the banks
#define ONES 0x3f803f80u                  // a pair of bfloat16

#if FLOAT_BYTES

#define PARTS 1   // stages in a chunk
#define CHUNK 64  // columns

// Of 64 columns, 8 c to 8 c + 7 of each 32.
struct Own {
    uint4 words[2];
};

// `first` is the index of the row's first block.
__device__ __forceinline__ Own load_own(const Matrix& m, u32 first, int chunk) {
    Own own;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 index = first + min(2 * chunk + i, m.blocks - 1);
        own.words[i] = ((const uint4*)m.base)[(u64)index * 4 + threadIdx.x % 4];
    }
    return own;
}

struct Decoder {
    __device__ __forceinline__ void begin(const Own&) {}

    // Columns 4 step to 4 step + 3 of a lane, as two pairs.
    __device__ __forceinline__ void pairs(const Own& own, int step, u32& low, u32& high) const {
        const uint4 w = own.words[step / 2];
        low = step % 2 ? w.z : w.x, high = step % 2 ? w.w : w.y;
#if !BF16
        low = pack_bf16(half_to_float((u16)low), half_to_float((u16)(low >> 16)));
        high = pack_bf16(half_to_float((u16)high), half_to_float((u16)(high >> 16)));
#endif
    }
};

#else

#define PARTS 2
#define CHUNK 128
typedef Raw Own;

__device__ __forceinline__ Own load_own(const Matrix& m, u32 first, int chunk) {
    const u32 index = first + min(4 * chunk + (int)threadIdx.x % 4, m.blocks - 1);
    return load_raw_at(m, index, index / 8);  // where there are records, rows are whole ones
}

// Bytes become bfloat16 without a conversion: 0x4300 + i is 128 + i for i < 128. All integers up to 256 are exact.
struct Decoder {
    u32 scales[HALVES], minimums[HALVES];

    __device__ __forceinline__ void begin(const Own& own) {
        float scale[HALVES], minimum[HALVES];
        scales_of(own, scale, minimum);
#pragma unroll
        for (int h = 0; h < HALVES; h++) scales[h] = pack_bf16(scale[h], scale[h]), minimums[h] = pack_bf16(minimum[h], minimum[h]);
    }

    __device__ __forceinline__ u32 pair(u32 bytes, u32 selector, int h) const {
        u32 value = __byte_perm(bytes, 0x43, selector), offset = 0xc300c300u + ZERO * 0x00010001u;  // -(128 + ZERO)
#ifdef CODEBOOK
        offset = (value & 0x00800080u) ^ 0xc300c300u;  // signed bytes: the sign is 128 more to subtract
        value &= 0xff7fff7fu;
#elif ZERO == 128
        offset = (value & 0x00800080u) ^ 0xc380c380u;
        value &= 0xff7fff7fu;
#endif
        value = fma_bf16(value, ONES, offset);
        return fma_bf16(value, scales[h], MINIMUM ? minimums[h] : 0x80008000u);
    }

    __device__ __forceinline__ void pairs(const Own& own, int step, u32& low, u32& high) const {
        u32 bytes = bytes_of(own, step);
#ifdef CODEBOOK
        bytes = (u32)look_up(bytes);
#endif
        const int h = HALVES == 2 ? step / 4 : 0;
        low = pair(bytes, 0x4140, h), high = pair(bytes, 0x4342, h);
    }
};

#endif

// Leaves the warps' sums in shared memory, [WARPS][TOKENS][STRIDE(TILES)]: a warp's tile i is 16 rows of m[i] from rows[i] on, as far as there are.
template <int TILES>
__device__ __forceinline__ void multiply_tiles(
    u16* shared, const Matrix (&m)[TILES], const int (&rows)[TILES], const u16* x, int x_stride, i64 first, int live
) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4;
    const int columns = m[0].blocks * 32, chunks = (columns + CHUNK - 1) / CHUNK;
    const int row_warp = warp / COLUMN_WARPS, column_warp = warp % COLUMN_WARPS;
    u16* stages = shared + column_warp * STAGES * STAGE;

    // Units of 8 columns lie as lanes read them, [GROUPS][2][32]; lanes of the second are permuted, so that writing meets all banks, too.
    // A row that does not exist is another one: nobody reads its sums. Columns that do not exist are zeros. Warps that share x deal out
    // the two halves of a stage, and then the groups.
    const int half = ROW_WARPS > 1 ? row_warp % 2 : 0, group = ROW_WARPS == 4 ? row_warp / 2 : 0, halves = ROW_WARPS > 1 ? 1 : 2;
    const int own_groups = ROW_WARPS == 4 ? (GROUPS + 1) / 2 : GROUPS, group_step = ROW_WARPS == 4 ? 2 : 1;
#if FLOAT_BYTES
    const int unit = half, owner = c, step = 32;
    int column = column_warp * CHUNK + half * step + c * 8;
#else
    const int unit = c % 2, owner = 2 * half + c / 2, step = 64;
    int column = column_warp * CHUNK + owner * 32 + unit * 8;
#endif
    const u16* sources[own_groups];
#pragma unroll
    for (int n = 0; n < own_groups; n++) sources[n] = x + (first + min((group + n * group_step) * 8 + lane / 4, live - 1)) * x_stride + column;
    auto copy_x = [&](int ahead, int stage) {  // parts from the chunk of `sources` on
        const int from = ahead / PARTS * COLUMN_WARPS * CHUNK + ahead % PARTS * 16;
#pragma unroll
        for (int i = 0; i < halves; i++) {
#if FLOAT_BYTES
            u16* target = stages + stage * STAGE + (unit + i) * 256 + (lane ^ (2 * (unit + i))) * 8;
#else
            u16* target = stages + stage * STAGE + unit * 256 + ((lane / 4 * 4 + owner + 2 * i) ^ (2 * unit)) * 8;
#endif
#pragma unroll
            for (int n = 0; n < own_groups; n++)
                if (group + n * group_step < GROUPS)
                    copy_async(target + (group + n * group_step) * 512, sources[n] + from + i * step, column + from + i * step < columns);
        }
        commit_copies();
    };
    auto meet = [&] {
        if (ROW_WARPS > 1) __syncthreads();
        else __syncwarp();
    };
    u32 firsts[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) firsts[i][j] = (u32)min(rows[i] + lane / 4 + 8 * j, m[i].rows - 1) * m[i].blocks;
    // Chunks of weights that are on their way, with the one that is multiplied. With eight rows of x there are registers for more than two.
    constexpr int words = TILES * 2 * (int)sizeof(Own) / 4, fit = 112 / words, depth = GROUPS > 1 || fit < 2 ? 2 : fit > 4 ? 4 : fit;
    Own own[depth][TILES][2];
    auto fetch = [&](Own (&target)[TILES][2], int chunk) {  // the last one again, if there is none
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) target[i][j] = load_own(m[i], firsts[i][j], chunk);
    };

    float sums[TILES][GROUPS][4];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < GROUPS; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) sums[i][n][k] = 0.0f;
#pragma unroll
    for (int d = 0; d < depth; d++) fetch(own[d], d * COLUMN_WARPS + column_warp);
    wait_for_previous();  // weights are on their way before x is there
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) copy_x(s, s);
    unsigned stage = 0;
    auto multiply = [&](const Own (&weights)[TILES][2]) {
        Decoder decoders[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++) decoders[i][j].begin(weights[i][j]);
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            wait_copies<STAGES - 2>();
            meet();  // others' copies are there, and the stage before has been read
            copy_x(part + STAGES - 1, (stage + STAGES - 1) % STAGES);
            const uint4* units = (const uint4*)(stages + stage * STAGE);
            stage = (stage + 1) % STAGES;
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                uint4 b[GROUPS];
#pragma unroll
                for (int n = 0; n < GROUPS; n++) b[n] = units[(n * 2 + unit) * 32 + (lane ^ (2 * unit))];
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int i = 0; i < TILES; i++) {
                        u32 a[4];
#pragma unroll
                        for (int j = 0; j < 2; j++) decoders[i][j].pairs(weights[i][j], (part * 2 + unit) * 2 + half, a[j], a[j + 2]);
#pragma unroll
                        for (int n = 0; n < GROUPS; n++) mma(sums[i][n], a, half ? b[n].z : b[n].x, half ? b[n].w : b[n].y);
                    }
            }
        }
        column += COLUMN_WARPS * CHUNK;
#pragma unroll
        for (int n = 0; n < own_groups; n++) sources[n] += COLUMN_WARPS * CHUNK;
    };
    for (int base = 0; base < chunks; base += depth * COLUMN_WARPS)  // as often in all warps; behind the last column x is 0
#pragma unroll
        for (int d = 0; d < depth; d++) {
            if (base + d * COLUMN_WARPS >= chunks) break;
            multiply(own[d]);
            fetch(own[d], base + (d + depth) * COLUMN_WARPS + column_warp);
        }
    wait_copies<0>();
    __syncthreads();
    float* target = (float*)shared + warp * TOKENS * STRIDE(TILES);
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < GROUPS; n++)
#pragma unroll
            for (int k = 0; k < 4; k++) target[(n * 8 + 2 * c + k % 2) * STRIDE(TILES) + i * 16 + lane / 4 + k / 2 * 8] = sums[i][n][k];
}

// The product of row `row` of the tiles of row warp `row_warp` with row `token` of x.
template <int TILES>
__device__ __forceinline__ float sum_of(const float* sums, int row_warp, int token, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < COLUMN_WARPS; i++) sum += sums[((row_warp * COLUMN_WARPS + i) * TOKENS + token) * STRIDE(TILES) + row];
    return sum;
}

// As `matvec`: up to three matrices of one width. blockIdx.x counts groups of TOKENS rows of x: blocks that run together share their weights.
extern "C" __global__ void __launch_bounds__(32 * WARPS) matmul_few(
    const u8* weights0, int rows0, float* out0, int stride0, const u8* weights1, int rows1, float* out1, int stride1, const u8* weights2,
    int rows2, float* out2, int stride2, int blocks, const u16* x, int x_stride, int accumulate, const int* count
) {
    DYNAMIC_SHARED(shared);
    let_next_start();
    const i64 first = (i64)blockIdx.x * TOKENS;
    const int live = min(*count - (int)first, TOKENS), own_rows = 16 * MATRIX_TILES, size = ROW_WARPS * own_rows;
    const u8* weights = weights0;
    float* out = out0;
    int row = blockIdx.y * size, rows = rows0, stride = stride0;
    if (row >= rows) {
        row -= (rows + size - 1) / size * size;
        weights = weights1, rows = rows1, out = out1, stride = stride1;
    }
    if (row >= rows) {
        row -= (rows + size - 1) / size * size;
        weights = weights2, rows = rows2, out = out2, stride = stride2;
    }
    if (live <= 0 || row >= rows) return wait_for_previous();
    const Matrix matrix = opaque(matrix_at(weights, rows, blocks));
    Matrix matrices[MATRIX_TILES];
    int own[MATRIX_TILES];
#pragma unroll
    for (int i = 0; i < MATRIX_TILES; i++) {
        matrices[i] = matrix;
        own[i] = row + threadIdx.x / 32 / COLUMN_WARPS * own_rows + 16 * i;
    }
    multiply_tiles<MATRIX_TILES>((u16*)shared, matrices, own, x, x_stride, first, live);
    __syncthreads();
    for (int i = threadIdx.x; i < live * size; i += 32 * WARPS) {
        const int token = i / size, r = i % size;
        if (row + r >= rows) continue;
        float* target = out + (first + token) * stride + row + r;
        const float sum = sum_of<MATRIX_TILES>((float*)shared, r / own_rows, token, r % own_rows);
        *target = accumulate ? *target + sum : sum;
    }
}

// activation(x @ gate.T) * (x @ up.T), in every form: 16 columns of each row warp, two or four.
extern "C" __global__ void __launch_bounds__(32 * WARPS) gated_matmul_few(
    const u8* gate, const u8* up, int rows, int blocks, const u16* x, int x_stride, int kind, ROWS_ARGUMENTS, const int* count
) {
    DYNAMIC_SHARED(shared);
    let_next_start();
    const i64 first = (i64)blockIdx.x * TOKENS;
    const int live = min(*count - (int)first, TOKENS), size = 16 * ROW_WARPS;
    if (live <= 0) return wait_for_previous();
    const Matrix matrices[2] = {opaque(matrix_at(gate, rows, blocks)), opaque(matrix_at(up, rows, blocks))};
    const int row = blockIdx.y * size + threadIdx.x / 32 / COLUMN_WARPS * 16, own[2] = {row, row};
    multiply_tiles<2>((u16*)shared, matrices, own, x, x_stride, first, live);
    __syncthreads();
    for (int i = threadIdx.x; i < live * size; i += 32 * WARPS) {
        const int token = i / size, r = i % size, column = blockIdx.y * size + r;
        const float raised = sum_of<2>((float*)shared, r / 16, token, 16 + r % 16);
        const float value = activation(kind, sum_of<2>((float*)shared, r / 16, token, r % 16)) * raised;
        if (column - r % 32 < out_stride) emit(ROWS_OUT, first + token, column, column < rows ? value : 0.0f);
    }
}
