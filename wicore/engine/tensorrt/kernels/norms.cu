// RMS norms along the float32 residual stream, the embeddings and images that begin it, and gathering of rows.
//
// One block a row, or for many rows a few blocks a multiprocessor that go through them. A row's sums have a fixed
// order that depends on HIDDEN and THREADS alone.
//
// Macros:
//   HIDDEN   the width, a multiple of 8
//   THREADS  of a block, a multiple of 32
//   BLOCKS   of those that go through rows, how many a multiprocessor is to have
//
// variant: HIDDEN=5376 THREADS=672 BLOCKS=2
// variant: HIDDEN=640 THREADS=96 BLOCKS=14
// variant: HIDDEN=72 THREADS=32 BLOCKS=32
#include "common.cuh"

constexpr int kVectors = HIDDEN / 4;  // of four values
constexpr int kOwn = (kVectors + THREADS - 1) / THREADS;
constexpr float kShare = 1.0f / HIDDEN;

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

// Four halves.
__device__ __forceinline__ float4 widen(uint2 bits) {
  float2 low = __half22float2(*reinterpret_cast<const half2*>(&bits.x));
  float2 high = __half22float2(*reinterpret_cast<const half2*>(&bits.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ __forceinline__ float squares(float4 v) { return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w); }

// Write residual values, and half(residual * rsqrt(mean of squares + eps) * weight); `weight(i)` are those of the
// i-th vector of this thread.
template <typename Weight>
__device__ __forceinline__ void finish(const float4 (&v)[kOwn], Weight weight, float* residual, half* normed,
                                       float eps, float* scratch) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    reinterpret_cast<float4*>(residual)[own(i)] = v[i];
    sum += squares(v[i]);
  }
  float scale = rsqrtf(sum_block(sum, scratch) * kShare + eps);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    const float4 w = weight(i);
    uint2 bits = make_uint2(pack_half2(v[i].x * scale * w.x, v[i].y * scale * w.y),
                            pack_half2(v[i].z * scale * w.z, v[i].w * scale * w.w));
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
    float4 e = widen(reinterpret_cast<const uint2*>(source)[own(i)]);
    v[i] = make_float4(e.x * scale, e.y * scale, e.z * scale, e.w * scale);
  }
  auto weight_of = [&](int i) { return factor[i]; };
  finish(v, weight_of, residual + row * HIDDEN, normed + row * HIDDEN, eps, scratch);
}

// Grid: rows. normed as in add_norm, of a residual stream that something else has written.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_rows(float* residual, const float* weight, half* normed, float eps) {
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  const long long row = static_cast<long long>(blockIdx.x) * HIDDEN;
  float4 v[kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    if (is_own(i)) v[i] = load4(residual + row, own(i));
  auto weight_of = [&](int i) { return load4(weight, own(i)); };
  finish(v, weight_of, residual + row, normed + row, eps, scratch);
}

// v += d * scale * weight.
__device__ __forceinline__ void add(float4& v, float4 d, float scale, float4 weight) {
  v.x += d.x * scale * weight.x;
  v.y += d.y * scale * weight.y;
  v.z += d.z * scale * weight.z;
  v.w += d.w * scale * weight.w;
}

// Grid: rows. residual += delta * rsqrt(mean of delta^2 + delta_eps) * post; normed = half(residual * rsqrt(mean
// of residual^2 + eps) * next).
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm_float(const float* delta, const float* post, float* residual, const float* next, half* normed,
                   float delta_eps, float eps) {
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
  float scale = rsqrtf(sum_block(sum, scratch[0]) * kShare + delta_eps);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) add(v[i], d[i], scale, after[i]);
  auto following = [&](int i) { return factor[i]; };
  finish(v, following, residual + row, normed + row, eps, scratch[1]);
}

// The same of a delta of halves, for many rows: bound by their bytes, so while a row is summed the block's next one
// is under way. The last rows come first: what the kernel before wrote last is still in L2, and so is then what the
// next one reads first. Grid: at most a block a row. Dynamic shared memory: the factors.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    add_norm_half(const half* delta, const float* post, float* residual, const float* next, half* normed,
                  float delta_eps, float eps, int rows) {
  SHARED_MEMORY(float4, factors);
  __shared__ float scratch[2][32];
  pdl_launch();
  // A thread reads what it wrote itself; registers are for rows.
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (!is_own(i)) continue;
    factors[own(i)] = load4(post, own(i));
    factors[kVectors + own(i)] = load4(next, own(i));
  }
  pdl_wait();
  uint2 coming_d[kOwn] = {};
  float4 coming_v[kOwn] = {};
  auto ask = [&](int row) {
    const unsigned at = static_cast<unsigned>(row) * HIDDEN;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (!is_own(i)) continue;
      coming_d[i] = reinterpret_cast<const uint2*>(delta + at)[own(i)];
      coming_v[i] = load4(residual + at, own(i));
    }
  };
  const int blocks = static_cast<int>(gridDim.x);
  int row = rows - 1 - static_cast<int>(blockIdx.x);
  ask(row);
#pragma unroll 1
  for (; row >= 0; row -= blocks) {
    uint2 d[kOwn];
    float4 v[kOwn];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      d[i] = coming_d[i];
      v[i] = coming_v[i];
      sum += squares(widen(d[i]));
    }
    if (row >= blocks) ask(row - blocks);
    float scale = rsqrtf(sum_block(sum, scratch[0]) * kShare + delta_eps);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (is_own(i)) add(v[i], widen(d[i]), scale, factors[own(i)]);
    const unsigned at = static_cast<unsigned>(row) * HIDDEN;
    auto following = [&](int i) { return factors[kVectors + own(i)]; };
    finish(v, following, residual + at, normed + at, eps, scratch[1]);
  }
}

// Grid: rows of the target. target[i] = source[rows[i]]; zeros where rows[i] < 0.
extern "C" __global__ void __launch_bounds__(THREADS) 
    gather(const int* rows, const uint4* source, uint4* target, int vectors) {
  pdl_launch();
  pdl_wait();
  const long long to = blockIdx.x, from = rows[to];
  for (int i = threadIdx.x; i < vectors; i += THREADS) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (from >= 0) v = source[from * vectors + i];
    target[to * vectors + i] = v;
  }
}
