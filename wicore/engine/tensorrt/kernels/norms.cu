// RMS norms along the float32 residual stream, the embedding that begins it, and gathering of rows.
//
// One block a row. A row's sums have a fixed order that depends on HIDDEN and THREADS alone.
//
// Macros:
//   HIDDEN   the width, a multiple of 8
//   THREADS  of a block, a multiple of 32
//
// variant: HIDDEN=5376 THREADS=672
// variant: HIDDEN=640 THREADS=96
// variant: HIDDEN=72 THREADS=32
#include "common.cuh"

constexpr int kVectors = HIDDEN / 4;  // of four values
constexpr int kOwn = (kVectors + THREADS - 1) / THREADS;
constexpr float kWidth = HIDDEN;

// Sum over the block; each use needs its own `scratch`, so that one barrier is enough.
__device__ __forceinline__ float sum_block(float v, float* scratch) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  int lane = threadIdx.x % 32;
  return warp_sum(lane < THREADS / 32 ? scratch[lane] : 0.0f);
}

// The i-th vector of this thread.
__device__ __forceinline__ int own(int i) { return i * THREADS + static_cast<int>(threadIdx.x); }

__device__ __forceinline__ bool is_own(int i) { return kVectors % THREADS == 0 || own(i) < kVectors; }

__device__ __forceinline__ float4 load4(const float* row, int vector) {
  return reinterpret_cast<const float4*>(row)[vector];
}

__device__ __forceinline__ float4 load4(const half* row, int vector) {
  uint2 bits = reinterpret_cast<const uint2*>(row)[vector];
  float2 low = __half22float2(*reinterpret_cast<const half2*>(&bits.x));
  float2 high = __half22float2(*reinterpret_cast<const half2*>(&bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float squares(float4 v) { return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w); }

// Write residual values, and half(residual * rsqrt(mean of squares + eps) * weight).
__device__ __forceinline__ void finish(const float4 (&v)[kOwn], const float4 (&weight)[kOwn], float* residual,
                                       half* normed, float eps, float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    reinterpret_cast<float4*>(residual)[own(i)] = v[i];
    sum += squares(v[i]);
  }
  float scale = rsqrtf(sum_block(sum, scratch) / kWidth + eps);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    uint2 bits = make_uint2(pack_half2(v[i].x * scale * weight[i].x, v[i].y * scale * weight[i].y),
                            pack_half2(v[i].z * scale * weight[i].z, v[i].w * scale * weight[i].w));
    reinterpret_cast<uint2*>(normed)[own(i)] = bits;
  }
}

// Grid: rows. residual = table[id] * scale, normed as in add_norm. Ids below 0 are read as 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(const int* ids, const half* table, const float* weight, float* residual, half* normed, float scale,
          float eps) {
  __shared__ float scratch[32];
  pdl_launch();
  float4 factor[kOwn] = {}, v[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if (is_own(i)) factor[i] = load4(weight, own(i));
  pdl_wait();
  const long long row = blockIdx.x;
  const half* source = table + static_cast<long long>(max(ids[row], 0)) * HIDDEN;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    float4 e = load4(source, own(i));
    v[i] = make_float4(e.x * scale, e.y * scale, e.z * scale, e.w * scale);
  }
  finish(v, factor, residual + row * HIDDEN, normed + row * HIDDEN, eps, scratch);
}

// residual += delta * rsqrt(mean of delta^2 + delta_eps) * post; normed = half(residual * rsqrt(mean of
// residual^2 + eps) * next).
template <typename Delta>
__device__ __forceinline__ void add_norm(const Delta* delta, const float* post, float* residual, const float* next,
                                         half* normed, float delta_eps, float eps) {
  __shared__ float scratch[2][32];
  pdl_launch();
  float4 after[kOwn] = {}, factor[kOwn] = {}, d[kOwn] = {}, v[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    after[i] = load4(post, own(i));
    factor[i] = load4(next, own(i));
  }
  pdl_wait();
  const long long row = static_cast<long long>(blockIdx.x) * HIDDEN;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    d[i] = load4(delta + row, own(i));
    v[i] = load4(residual + row, own(i));
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sum += squares(d[i]);
  float scale = rsqrtf(sum_block(sum, scratch[0]) / kWidth + delta_eps);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    v[i].x += d[i].x * scale * after[i].x;
    v[i].y += d[i].y * scale * after[i].y;
    v[i].z += d[i].z * scale * after[i].z;
    v[i].w += d[i].w * scale * after[i].w;
  }
  finish(v, factor, residual + row, normed + row, eps, scratch[1]);
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm_float(const float* delta, const float* post, float* residual, const float* next, half* normed,
                   float delta_eps, float eps) {
  add_norm(delta, post, residual, next, normed, delta_eps, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm_half(const half* delta, const float* post, float* residual, const float* next, half* normed,
                  float delta_eps, float eps) {
  add_norm(delta, post, residual, next, normed, delta_eps, eps);
}

// Grid: rows of the target. target[i] = source[rows[i]]; zeros where rows[i] < 0.
extern "C" __global__ void __launch_bounds__(THREADS) gather(const int* rows, const half* source, half* target) {
  pdl_launch();
  pdl_wait();
  const long long to = blockIdx.x, from = rows[to];
  for (int i = threadIdx.x; i < HIDDEN / 8; i += THREADS) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (from >= 0) v = reinterpret_cast<const uint4*>(source + from * HIDDEN)[i];
    reinterpret_cast<uint4*>(target + to * HIDDEN)[i] = v;
  }
}
