// Hopper's products of a warpgroup (sm_90a alone), one instruction to a function. A simulator brings functions of the same names.
#pragma once
#include "tensor_cores.cuh"

// A tile of K-major bfloat16 in shared memory is [rows][64], a row 128 bytes, from a multiple of 1024 bytes on. The 16-byte pieces of a
// row are swizzled: piece p of row r is at place p ^ (r % 8) (PTX ISA, "128-Byte swizzling mode").
#define TILE_K 64

__device__ __forceinline__ u16* swizzled(u16* tile, int row, int piece) { return tile + row * TILE_K + (piece ^ (row & 7)) * 8; }

#ifndef CUDA_ON_HOST

// What wgmma takes for a tile: address / 16, 1024 bytes from eight rows to the next, swizzled in 128 bytes. 16 columns further: 2 more.
__device__ __forceinline__ u64 tile_descriptor(const u16* tile) {
    const u64 address = (u32)__cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// What a thread has written to shared memory, asynchronous copies that have arrived too, is seen by wgmma after the next barrier.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS16(i) SUMS4(i), SUMS4(i + 4), SUMS4(i + 8), SUMS4(i + 12)
#define SUMS64(i) SUMS16(i), SUMS16(i + 16), SUMS16(i + 32), SUMS16(i + 48)

// Wait until at most PENDING groups of this warpgroup's products are under way.
template <int PENDING>
__device__ __forceinline__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Sums that products have written: nothing reads them before this, which comes after waiting for all.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d += a b for bfloat16 a [64][16] and b [16][2 N] in shared memory: the fragments of mma, of which warp w of the four has rows 16 w on.
template <int N>
__device__ __forceinline__ void product(float (&d)[N], u64 a, u64 b) {
    if constexpr (N == 128)
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
            "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
            "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
            "%122,%123,%124,%125,%126,%127}, %128, %129, 1, 1, 1, 0, 0;"
            : SUMS64(0), SUMS64(64)
            : "l"(a), "l"(b)
            : "memory");
    else
        asm volatile(
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
            "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
            "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
            " %64, %65, 1, 1, 1, 0, 0;"
            : SUMS64(0)
            : "l"(a), "l"(b)
            : "memory");
}

#endif
