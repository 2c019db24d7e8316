// What the kernels that attend share: scores are logarithms to base 2, and a token's positions may be split over blocks.
#pragma once
#include "common.cuh"

#define LOG2E 1.4426950408889634f
#define SLACK 8.0f  // powers of two that a score may be above the maximum that outputs are kept by, before they are scaled down

// cap * tanh(score / cap), of natural logarithms.
__device__ __forceinline__ float capped(float score, float cap) {
    const float limit = cap * LOG2E;
    return limit - __fdividef(2.0f * limit, 1.0f + exp2f(score * (2.0f / cap)));
}

// Positions that each split of a token takes: whole runs of 32, at least 64.
__device__ __forceinline__ int split_length(int length, int splits) { return max(64, (length + 32 * splits - 1) / (32 * splits) * 32); }

#define MAX_SPLITS 128
