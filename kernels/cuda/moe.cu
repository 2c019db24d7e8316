// A mixture of experts around the products: choose, group tokens by expert, add up what the experts say.
#include "common.cuh"

// The best experts of each token and their weights: softmax over all, then the `top_k` largest; of equals the first. A warp has a token.
extern "C" __global__ void route(
    const float* logits, int stride, int experts, int top_k, int normalize, int* chosen, float* weights, const int* count
) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= *count) return;
    const float* own = logits + (i64)token * stride;
    float peak = __uint_as_float(0xff800000u);  // minus infinity
    for (int e = lane; e < experts; e += 32) peak = fmaxf(peak, own[e]);
    peak = warp_max(peak);
    float total = 0.0f;
    for (int e = lane; e < experts; e += 32) total += expf(own[e] - peak);
    total = warp_sum(total);
    float kept = 0.0f, last_value = 0.0f;
    int last = -1;
    for (int k = 0; k < top_k; k++) {
        int best = -1;
        float best_value = 0.0f;
        for (int e = lane; e < experts; e += 32) {
            const float value = own[e];
            const bool follows = last < 0 || value < last_value || (value == last_value && e > last);
            if (follows && (best < 0 || value > best_value)) best = e, best_value = value;
        }
        for (int offset = 16; offset; offset >>= 1) {
            const int other = __shfl_xor_sync(FULL, best, offset);
            const float other_value = __shfl_xor_sync(FULL, best_value, offset);
            if (other >= 0 && (best < 0 || other_value > best_value || (other_value == best_value && other < best)))
                best = other, best_value = other_value;
        }
        best = max(best, 0);  // logits that are no numbers
        last = best, last_value = best_value;
        const float weight = expf(best_value - peak);
        kept += weight;
        if (lane == 0) chosen[token * top_k + k] = best, weights[token * top_k + k] = weight;
    }
    __syncwarp();
    for (int k = lane; k < top_k; k += 32) weights[token * top_k + k] /= normalize ? kept : total;
}

// Put every (token, choice) into a tile of `tile_rows` places of its expert, in order. One block of 256 threads; shared memory for
// 2 * experts ints. places: [tiles][tile_rows], a choice or -1; tile_experts: whose tile it is; tiles: how many there are.
extern "C" __global__ void group(
    const int* chosen, int top_k, int experts, int tile_rows, int* places, int* tile_experts, int* tiles, const int* count
) {
    let_next_start();
    wait_for_previous();
    DYNAMIC_SHARED(shared);
    int* counts = (int*)shared;
    int* firsts = counts + experts;
    const int choices = *count * top_k;
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {  // one thread to an expert: the order of choices is kept
        int own = 0;
        for (int c = 0; c < choices; c++) own += chosen[c] == e;
        counts[e] = own;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int tile = 0;
        for (int e = 0; e < experts; e++) {
            firsts[e] = tile;
            tile += (counts[e] + tile_rows - 1) / tile_rows;
        }
        *tiles = tile;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        const int used = (counts[e] + tile_rows - 1) / tile_rows;
        for (int t = 0; t < used; t++) tile_experts[firsts[e] + t] = e;
        int* target = places + (i64)firsts[e] * tile_rows;
        int own = 0;
        for (int c = 0; c < choices; c++)
            if (chosen[c] == e) target[own++] = c;
        for (; own < used * tile_rows; own++) target[own] = -1;
    }
}

// activation(gate) * up for each choice, in every form. blockIdx.y is the choice.
extern "C" __global__ void gate_choices(
    const float* gate, const float* up, int stride, int columns, int kind, int top_k, ROWS_ARGUMENTS, const int* count
) {
    let_next_start();
    wait_for_previous();
    const i64 choice = blockIdx.y;
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (choice >= (i64)*count * top_k || i / 128 * 128 >= columns) return;
    const bool whole = columns % 4 == 0;
    const float4 a = load4(gate + choice * stride, i, columns, whole), b = load4(up + choice * stride, i, columns, whole);
    const float4 x = {activation(kind, a.x) * b.x, activation(kind, a.y) * b.y, activation(kind, a.z) * b.z, activation(kind, a.w) * b.w};
    emit4(ROWS_OUT, choice, i, columns, x);  // an activation of 0 is 0
}

// out[token] is the sum of its choices' rows, by weight.
extern "C" __global__ void combine(
    const float* rows, int stride, const float* weights, int top_k, int columns, ROWS_ARGUMENTS, const int* count
) {
    let_next_start();
    wait_for_previous();
    const i64 token = blockIdx.y;
    const int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (token >= *count || i / 128 * 128 >= columns) return;
    float4 total = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 0; k < top_k; k++) {
        const float weight = weights[token * top_k + k];
        const float4 x = load4(rows + (token * top_k + k) * stride, i, columns, columns % 4 == 0);
        total.x += weight * x.x, total.y += weight * x.y, total.z += weight * x.z, total.w += weight * x.w;
    }
    emit4(ROWS_OUT, token, i, columns, total);
}
