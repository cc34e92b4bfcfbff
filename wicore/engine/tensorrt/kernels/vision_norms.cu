// What is between the products of a vision tower: sums along the residual stream, LayerNorms, and the pooling before
// the projector. One block a row, or a pooled token; every sum has a fixed order that depends on HIDDEN alone.
//
// Macros: HIDDEN, the tower's width, a multiple of 8.
// variant: HIDDEN=1152
// variant: HIDDEN=24
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int PAIRS = HIDDEN / 2;
constexpr int OWN = (PAIRS + THREADS - 1) / THREADS;  // pairs of a thread
constexpr float SHARE = 1.0f / HIDDEN;

__device__ __forceinline__ int own(int i) { return i * THREADS + static_cast<int>(threadIdx.x); }
__device__ __forceinline__ bool is_own(int i) { return PAIRS % THREADS == 0 || own(i) < PAIRS; }
__device__ __forceinline__ float2 pair(const float* row, int i) { return reinterpret_cast<const float2*>(row)[own(i)]; }

// v becomes weight (v - mean) / sqrt(variance + eps) + bias (Ba et al., 2016, arXiv:1607.06450).
__device__ __forceinline__ void layer_norm(float2 (&v)[OWN], const float* weight, const float* bias, float eps,
                                           float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    if (is_own(i)) sum += v[i].x + v[i].y;
  const float mean = block_sum(sum, scratch) * SHARE;
  sum = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!is_own(i)) continue;
    v[i].x -= mean, v[i].y -= mean;
    sum += v[i].x * v[i].x + v[i].y * v[i].y;
  }
  const float scale = 1.0f / sqrtf(block_sum(sum, scratch) * SHARE + eps);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!is_own(i)) continue;
    const float2 w = pair(weight, i), b = pair(bias, i);
    v[i].x = fmaf(v[i].x * scale, w.x, b.x), v[i].y = fmaf(v[i].y * scale, w.y, b.y);
  }
}

// v = base + delta * scale + bias, of a row.
__device__ __forceinline__ void add(float2 (&v)[OWN], const float* base, const float* delta, float scale,
                                    const float* bias) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!is_own(i)) continue;
    const float2 x = pair(base, i), d = pair(delta, i), b = pair(bias, i);
    v[i] = make_float2(x.x + fmaf(d.x, scale, b.x), x.y + fmaf(d.y, scale, b.y));
  }
}

__device__ __forceinline__ void finish(float2 (&v)[OWN], float* residual, const float* weight, const float* bias,
                                       half* normed, float eps, float* scratch) {
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    if (is_own(i)) reinterpret_cast<float2*>(residual)[own(i)] = v[i];
  layer_norm(v, weight, bias, eps, scratch);
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    if (is_own(i)) reinterpret_cast<uint32_t*>(normed)[own(i)] = pack_half2(v[i].x, v[i].y);
}

// Grid: rows. residual = base + delta * scale + delta_bias, which may be in base's place; normed = half of its norm.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_layer_norm(const float* base, const float* delta, float scale, const float* delta_bias, float* residual,
                   const float* weight, const float* bias, half* normed, float eps) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  const long long row = static_cast<long long>(blockIdx.x) * HIDDEN;
  float2 v[OWN] = {};
  add(v, base + row, delta + row, scale, delta_bias);
  finish(v, residual + row, weight, bias, normed + row, eps, scratch);
}

// Grid: rows. The same of embedded patches: residual = delta + delta_bias + positions.
extern "C" __global__ void __launch_bounds__(THREADS)
    place_layer_norm(const float* delta, const float* delta_bias, const half* positions, float* residual,
                     const float* weight, const float* bias, half* normed, float eps) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  const long long row = static_cast<long long>(blockIdx.x) * HIDDEN;
  float2 v[OWN] = {};
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!is_own(i)) continue;
    const float2 d = pair(delta + row, i), b = pair(delta_bias, i);
    const float2 p = __half22float2(reinterpret_cast<const half2*>(positions + row)[own(i)]);
    v[i] = make_float2(d.x + b.x + p.x, d.y + b.y + p.y);
  }
  finish(v, residual + row, weight, bias, normed + row, eps, scratch);
}

// Grid: tokens, row by row of a square. A token is the mean of the norms of a square of patches, of `side` by `side`
// of them, `across` in a row of the image; soft = half of its RMS norm times soft_norm. `base`, `delta`, `scale` and
// `delta_bias` are those of add_layer_norm.
extern "C" __global__ void __launch_bounds__(THREADS)
    pool_patches(const float* base, const float* delta, float scale, const float* delta_bias, const float* weight,
                 const float* bias, const float* soft_norm, half* soft, int across, int side, float eps) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  const int token = static_cast<int>(blockIdx.x), tokens_across = across / side;
  const int corner = token / tokens_across * side * across + token % tokens_across * side;
  float2 mean[OWN] = {};
#pragma unroll 1
  for (int j = 0; j < side * side; ++j) {
    const long long row = static_cast<long long>(corner + j / side * across + j % side) * HIDDEN;
    float2 v[OWN] = {};
    add(v, base + row, delta + row, scale, delta_bias);
    layer_norm(v, weight, bias, eps, scratch);
#pragma unroll
    for (int i = 0; i < OWN; ++i) mean[i].x += v[i].x, mean[i].y += v[i].y;
  }
  const float share = 1.0f / (side * side);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!is_own(i)) continue;
    mean[i].x *= share, mean[i].y *= share;
    sum += mean[i].x * mean[i].x + mean[i].y * mean[i].y;
  }
  const float root = 1.0f / sqrtf(block_sum(sum, scratch) * SHARE + eps);
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    if (!is_own(i)) continue;
    const float2 w = pair(soft_norm, i);
    const long long at = static_cast<long long>(token) * PAIRS + own(i);
    reinterpret_cast<uint32_t*>(soft)[at] = pack_half2(mean[i].x * root * w.x, mean[i].y * root * w.y);
  }
}
