// Head norms, rotation (arXiv:2104.09864, half-split), scaling of q, and the write to the KV cache. A warp has one head of one token.
// The cache of a layer is [block][key/value head][position in block][HEAD_DIM], bfloat16, or float32 with CACHE_F32.
#include "common.cuh"

#if CACHE_F32
typedef float Cached;
__device__ __forceinline__ void to_cache(Cached* out, float4 x) { *(float4*)out = x; }
#else
typedef u16 Cached;
// What is not finite must not reach the block's next owner, whose masked positions are multiplied by 0.
__device__ __forceinline__ float finite(float value) { return fminf(fmaxf(value, -3.38e38f), 3.38e38f); }
__device__ __forceinline__ void to_cache(Cached* out, float4 x) {
    *(uint2*)out = make_uint2(pack_bf16(finite(x.x), finite(x.y)), pack_bf16(finite(x.z), finite(x.w)));
}
#endif

// q, k, v lie in rows of their own strides; q is overwritten. `rotations` is [position][2][pairs]: cosines, then sines.
extern "C" __global__ void rope_and_cache(
    float* q, int q_stride, const float* k, int k_stride, const float* v, int v_stride, int heads, int kv_heads, const float* q_norm,
    const float* k_norm, float epsilon, const float* rotations, int pairs, float scale, const int* positions, const int* slots,
    Cached* keys, Cached* values, int block_size, const int* count
) {
    let_next_start();
    const i64 token = blockIdx.y;
    const int head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= *count || head >= heads + kv_heads) return;
    const bool is_query = head < heads;
    const int own = is_query ? head : head - heads;
    const float* source = is_query ? q + token * q_stride + own * HEAD_DIM : k + token * k_stride + own * HEAD_DIM;
    const float* weight = is_query ? q_norm : k_norm;
    const int position = positions[token], slot = slots[token];
    wait_for_previous();
    __shared__ __align__(16) float room[4][HEAD_DIM];  // of four warps
    float* x = room[threadIdx.x / 32];
    float squares = 0.0f;
    for (int i = 4 * lane; i < HEAD_DIM; i += 128) {
        const float4 a = *(const float4*)(source + i);
        *(float4*)(x + i) = a;
        squares += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
    }
    if (weight) {
        const float factor = 1.0f / sqrtf(warp_sum(squares) / HEAD_DIM + epsilon);
        for (int i = 4 * lane; i < HEAD_DIM; i += 128)
#pragma unroll
            for (int j = 0; j < 4; j++) x[i + j] *= factor * weight[i + j];
    }
    __syncwarp();
    if (rotations) {
        const float* cosines = rotations + (i64)position * pairs * 2;
        for (int i = lane; i < pairs; i += 32) {
            const float a = x[i], b = x[i + pairs], c = cosines[i], s = cosines[pairs + i];
            x[i] = a * c - b * s;
            x[i + pairs] = a * s + b * c;
        }
        __syncwarp();
    }
    const i64 at = (((i64)(slot / block_size) * kv_heads + own) * block_size + slot % block_size) * HEAD_DIM;
    for (int i = 4 * lane; i < HEAD_DIM; i += 128) {
        const float4 a = *(const float4*)(x + i);
        if (is_query) {
            *(float4*)(q + token * q_stride + own * HEAD_DIM + i) = make_float4(a.x * scale, a.y * scale, a.z * scale, a.w * scale);
        } else {
            to_cache(keys + at + i, a);
            to_cache(values + at + i, *(const float4*)(v + token * v_stride + own * HEAD_DIM + i));
        }
    }
}
