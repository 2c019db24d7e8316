// What all kernels start from: short names, reductions, conversions, and the rows that they write.
// No header is included: NVRTC needs none, and a host compiler that simulates a GPU brings its own names for all of this.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#ifndef CUDA_ON_HOST
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
#endif

// Programmatic dependent launch (sm_90 and later): blocks of the next kernel may start when all blocks of this one have, and load what no
// kernel writes, weights and the step's state, while this one ends. So every kernel begins with the first of these, and does the second
// before it touches anything else: then all kernels in front of it are done.
__device__ __forceinline__ void let_next_start() {
#if !defined(CUDA_ON_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if !defined(CUDA_ON_HOST) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#define FULL 0xffffffffu
#define LOWEST -1.0e30f  // of a masked score

__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// To the nearest, ties to even. The values are finite.
__device__ __forceinline__ u16 float_to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
#if !defined(CUDA_ON_HOST) && __CUDA_ARCH__ >= 800
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
#else
    return (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16;
#endif
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(FULL, value, offset);
    return value;
}

__device__ __forceinline__ int warp_sum_int(int value) {
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(FULL, value, offset);
    return value;
}

__device__ __forceinline__ float warp_max(float value) {
    for (int offset = 16; offset; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL, value, offset));
    return value;
}

// The sum over all threads of a block, in every thread. `room` is shared memory for 32 floats, of this sum alone.
__device__ __forceinline__ float block_sum(float value, float* room) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? room[threadIdx.x % 32] : 0.0f);  // every warp for itself
}

#define SILU 1
#define GELU 2
#define RELU 3

__device__ __forceinline__ float activation(int kind, float x) {
    if (kind == SILU) return __fdividef(x, 1.0f + expf(-x));
    if (kind == GELU) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    return fmaxf(x, 0.0f);
}

// Four columns of a row, from column i on; zeros behind the last. `whole`: columns are a multiple of 4, and the row starts at one of 16 bytes.
__device__ __forceinline__ float4 load4(const float* row, int i, int columns, bool whole) {
    if (whole) return i < columns ? *(const float4*)(row + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; j++) x[j] = i + j < columns ? row[i + j] : 0.0f;
    return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store4(float* row, int i, int columns, bool whole, float4 x) {
    const float values[4] = {x.x, x.y, x.z, x.w};
    if (whole && i < columns) *(float4*)(row + i) = x;
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (!whole && i + j < columns) row[i + j] = values[j];
}

// An array of activations, in the forms that its readers want; a null pointer: not in that form. Rows lie `stride` columns apart,
// a multiple of 32, in every form. int8 is 32 columns to a scale: {scale, scale * sum of the 32 int8}.
struct Rows {
    float* f32;
    i8* q8;
    float2* scales;
    u16* bf16;
    int stride;
};

#define ROWS_ARGUMENTS float *out_f32, i8 *out_q8, float2 *out_scales, u16 *out_bf16, int out_stride
#define ROWS_OUT Rows{out_f32, out_q8, out_scales, out_bf16, out_stride}

// A warp writes 32 consecutive columns, from a multiple of 32 on; every lane calls it, with 0 behind the last column.
__device__ __forceinline__ void emit(const Rows& out, i64 row, int column, float value) {
    i64 at = row * out.stride + column;
    if (out.f32) out.f32[at] = value;
    if (out.bf16) out.bf16[at] = float_to_bf16(value);
    if (out.q8) {
        float peak = warp_max(fabsf(value));
        int quant = peak > 1e-36f ? (int)rintf(value * (127.0f / peak)) : 0;
        int sum = warp_sum_int(quant);
        out.q8[at] = (i8)quant;
        if (column % 32 == 0) {
            float scale = peak > 1e-36f ? peak / 127.0f : 0.0f;
            out.scales[at / 32] = make_float2(scale, scale * sum);
        }
    }
}

// As `emit`, four columns to a lane: a warp writes 128, as far as the row goes (`columns`, up to a multiple of 32). Addresses are multiples of 16.
__device__ __forceinline__ void emit4(const Rows& out, i64 row, int column, int columns, float4 x) {
    const i64 at = row * out.stride + column;
    const bool inside = column / 32 * 32 < columns;
    if (out.f32 && inside) *(float4*)(out.f32 + at) = x;
    if (out.bf16 && inside) *(uint2*)(out.bf16 + at) = make_uint2(pack_bf16(x.x, x.y), pack_bf16(x.z, x.w));
    if (out.q8) {
        float peak = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
#pragma unroll
        for (int offset = 4; offset; offset >>= 1) peak = fmaxf(peak, __shfl_xor_sync(FULL, peak, offset));
        const float factor = peak > 1e-36f ? 127.0f / peak : 0.0f;
        const int quants[4] = {(int)rintf(x.x * factor), (int)rintf(x.y * factor), (int)rintf(x.z * factor), (int)rintf(x.w * factor)};
        int sum = quants[0] + quants[1] + quants[2] + quants[3];
#pragma unroll
        for (int offset = 4; offset; offset >>= 1) sum += __shfl_xor_sync(FULL, sum, offset);
        if (!inside) return;
        *(u32*)(out.q8 + at) = (quants[0] & 255) | (quants[1] & 255) << 8 | (quants[2] & 255) << 16 | (u32)quants[3] << 24;
        if (column % 32 == 0) {
            const float scale = peak > 1e-36f ? peak / 127.0f : 0.0f;
            out.scales[at / 32] = make_float2(scale, scale * sum);
        }
    }
}
