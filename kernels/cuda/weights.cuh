// Weights in planes (see planes.py): the layout is fixed by macros, so that one source serves all formats.
//   FLOAT_BYTES 0: quantised, with BITS, HIGH, SCALE, MINIMUM, HALVES, ZERO, CODEBOOK, UNIT; 2 or 4: floats, BF16 says which of 2 bytes.
#pragma once
#include "common.cuh"

#define SCALE_F16 0
#define SCALE_U8 1
#define SCALE_I8 2
#define SCALE_NIBBLES 3
#define SCALE_E8M0 4
#define SCALE_SUPER 5

struct Matrix {
    const u8* base;
    const u8* high;
    const u8* scales;
    const u8* supers;
    int rows, blocks;  // of 32 columns
};

// A compiler that knows an address to be a sum adds its parts anew for every load.
__device__ __forceinline__ const u8* opaque(const u8* address) {
#ifndef CUDA_ON_HOST
    asm("" : "+l"(address));
    __builtin_assume(__isGlobal(address));
#endif
    return address;
}

__device__ __forceinline__ i64 whole(i64 bytes) { return (bytes + 255) / 256 * 256; }

__device__ __forceinline__ Matrix opaque(const Matrix& m) {
    return Matrix{opaque(m.base), opaque(m.high), opaque(m.scales), opaque(m.supers), m.rows, m.blocks};
}

#if FLOAT_BYTES

__device__ __forceinline__ Matrix matrix_at(const u8* base, int rows, int blocks) { return Matrix{base, base, base, base, rows, blocks}; }

struct Raw {
    uint4 words[2 * FLOAT_BYTES];
};

__device__ __forceinline__ Raw load_raw(const Matrix& m, int row, int block) {
    Raw raw;
    const uint4* source = (const uint4*)(m.base + ((i64)row * m.blocks + block) * (32 * FLOAT_BYTES));
#pragma unroll
    for (int i = 0; i < 2 * FLOAT_BYTES; i++) raw.words[i] = source[i];
    return raw;
}

// The floats in 16 bytes: 4, or 8.
__device__ __forceinline__ void floats_of(uint4 words, float* out) {
    u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if FLOAT_BYTES == 4
        out[i] = __uint_as_float(w[i]);
#elif BF16
        out[2 * i] = __uint_as_float(w[i] << 16);
        out[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
#else
        out[2 * i] = half_to_float((u16)w[i]);
        out[2 * i + 1] = half_to_float((u16)(w[i] >> 16));
#endif
    }
}

__device__ __forceinline__ void unpack(const Raw& raw, float* out) {
#pragma unroll
    for (int i = 0; i < 2 * FLOAT_BYTES; i++) floats_of(raw.words[i], out + i * (16 / FLOAT_BYTES));
}

#else

#define SCALE_ITEM (SCALE == SCALE_F16 ? 2 : SCALE == SCALE_SUPER ? 0 : 1)
#define SCALE_BYTES (SCALE_ITEM * HALVES * (MINIMUM && SCALE != SCALE_NIBBLES ? 2 : 1))  // of one block
#define SUPERS (SCALE != SCALE_F16 && SCALE != SCALE_E8M0)
#define SUPER_BYTES (MINIMUM ? 4 : 2)  // of 256 columns
// With one scale to a block, the zero is a minimum of -ZERO * scale: the activations' sums are there anyway.
#define ZERO_IN_BYTES (ZERO && (HALVES == 2 || BITS == 8))
#define HAS_MINIMUM (MINIMUM || (ZERO && !ZERO_IN_BYTES))

__device__ __forceinline__ Matrix matrix_at(const u8* base, int rows, int blocks) {
    i64 count = (i64)rows * blocks;
    const u8* high = base + whole(count * 4 * BITS);
    const u8* scales = high + whole(count * 4 * HIGH);
    return Matrix{base, high, scales, scales + whole(count * SCALE_BYTES), rows, blocks};
}

struct Raw {
    u32 base[BITS];
    u32 high[HIGH ? HIGH : 1];
    u32 scale, super;
};

template <int WORDS>
__device__ __forceinline__ void load_words(const u8* source, u32* out) {
    if (WORDS == 1) out[0] = *(const u32*)source;
    if (WORDS == 2) {
        uint2 v = *(const uint2*)source;
        out[0] = v.x, out[1] = v.y;
    }
    if (WORDS >= 4) {
#pragma unroll
        for (int i = 0; i < WORDS / 4; i++) {
            uint4 v = ((const uint4*)source)[i];
            out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
        }
    }
}

// `index` counts the blocks of all rows, `record` 256 columns.
template <class Index>
__device__ __forceinline__ Raw load_raw_at(const Matrix& m, Index index, Index record) {
    Raw raw;
    load_words<BITS>(m.base + (u64)index * (4 * BITS), raw.base);
#if HIGH
    load_words<HIGH>(m.high + (u64)index * (4 * HIGH), raw.high);
#endif
    raw.scale = raw.super = 0;
    if (SCALE_BYTES == 4) raw.scale = *(const u32*)(m.scales + (u64)index * 4);
    if (SCALE_BYTES == 2) raw.scale = *(const u16*)(m.scales + (u64)index * 2);
    if (SCALE_BYTES == 1) raw.scale = m.scales[index];
    if (SUPERS) {
        const u8* super = m.supers + (u64)record * SUPER_BYTES;
        raw.super = SUPER_BYTES == 4 ? *(const u32*)super : *(const u16*)super;
    }
    return raw;
}

__device__ __forceinline__ Raw load_raw(const Matrix& m, int row, int block) {
    return load_raw_at(m, (i64)row * m.blocks + block, (i64)row * (m.blocks / 8) + block / 8);
}

// 32 columns: weight i is scale[i / 16] * quant + minimum[i / 16] (one of each, where HALVES is 1); quants are int8, four to a word.
struct Block {
    int quants[8];
    float scale[HALVES], minimum[HALVES];
};

#ifdef CODEBOOK
// Four indices to four values: the table's bytes are picked by __byte_perm, eight at a time.
__device__ __forceinline__ int look_up(u32 q) {
    const u32 table[4] = {CODEBOOK};
    u32 selector = (q & 0x7) | (q >> 4 & 0x70) | (q >> 8 & 0x700) | (q >> 12 & 0x7000);
    u32 low = __byte_perm(table[0], table[1], selector);
    if (BITS + HIGH == 3) return (int)low;
    u32 high = __byte_perm(table[2], table[3], selector);
    u32 mask = (q >> 3 & 0x01010101u) * 0xffu;
    return (int)((low & ~mask) | (high & mask));
}
#endif

// Columns 4 g to 4 g + 3 as they are stored, a byte each.
__device__ __forceinline__ u32 bytes_of(const Raw& raw, int g) {
    const int per_word = 8 / BITS;
    u32 q = raw.base[g / per_word] >> (BITS * (g % per_word));
    if (BITS < 8) q &= ((1u << BITS) - 1) * 0x01010101u;
#if HIGH
    const int per_plane = 8 / HIGH;
    q |= (raw.high[g / per_plane] >> (HIGH * (g % per_plane)) & (((1u << HIGH) - 1) * 0x01010101u)) << BITS;
#endif
    return q;
}

// Without what ZERO adds to a minimum.
__device__ __forceinline__ void scales_of(const Raw& raw, float (&scales)[HALVES], float (&minimums)[HALVES]) {
    float super = SUPERS ? half_to_float((u16)raw.super) * UNIT : 1.0f;
    float super_minimum = MINIMUM && SUPERS ? half_to_float((u16)(raw.super >> 16)) : 0.0f;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        u32 byte = raw.scale >> (8 * h) & 0xff;
        float scale = super, minimum = 0.0f;
        if (SCALE == SCALE_F16) {
            scale = half_to_float((u16)raw.scale);
            if (MINIMUM) minimum = half_to_float((u16)(raw.scale >> 16));
        }
        if (SCALE == SCALE_U8) {
            scale = super * (float)byte;
            if (MINIMUM) minimum = -super_minimum * (float)(raw.scale >> (8 * (h + HALVES)) & 0xff);
        }
        if (SCALE == SCALE_I8) scale = super * (float)(i8)byte;
        if (SCALE == SCALE_NIBBLES) {
            scale = super * (float)(byte & 15);
            minimum = -super_minimum * (float)(byte >> 4);
        }
        if (SCALE == SCALE_E8M0) scale = byte > 1 ? __uint_as_float((byte - 1) << 23) : 0.0f;  // below float32's range; CuPy compiles with -ftz=true
        scales[h] = scale;
        minimums[h] = minimum;
    }
}

__device__ __forceinline__ Block decode(const Raw& raw) {
    Block block;
#pragma unroll
    for (int g = 0; g < 8; g++) {
        u32 q = bytes_of(raw, g);
#ifdef CODEBOOK
        block.quants[g] = look_up(q);
#else
        if (ZERO == 128) q ^= 0x80808080u;
        else if (ZERO_IN_BYTES) q = ((q | 0x80808080u) - ZERO * 0x01010101u) ^ 0x80808080u;
        block.quants[g] = (int)q;
#endif
    }
    scales_of(raw, block.scale, block.minimum);
#pragma unroll
    for (int h = 0; h < HALVES; h++)
        if (ZERO && !ZERO_IN_BYTES) block.minimum[h] = -(float)ZERO * block.scale[h];
    return block;
}

__device__ __forceinline__ void unpack(const Raw& raw, float* out) {
    Block block = decode(raw);
#pragma unroll
    for (int i = 0; i < 32; i++) {
        float quant = (float)(i8)(block.quants[i / 4] >> (8 * (i % 4)));
        const int h = HALVES == 2 ? i / 16 : 0;
        out[i] = HAS_MINIMUM ? block.scale[h] * quant + block.minimum[h] : block.scale[h] * quant;
    }
}

#endif
