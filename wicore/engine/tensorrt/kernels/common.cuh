// What every kernel shares: instructions that CUDA C++ has no name for, each with a twin for the CPU
// emulation (WICORE_EMULATED), and reductions with a fixed order.
#pragma once

#ifdef WICORE_EMULATED
#include "cuda_emulation.h"
#else
#include <cuda_fp16.h>

// NVRTC before 13.1 has no <math.h> to take it from.
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif

typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#ifndef INFINITY  // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

// Dynamic shared memory as an array of T.
#define SHARED_MEMORY(T, name)                      \
  extern __shared__ __align__(128) char name##_[];  \
  T* name = reinterpret_cast<T*>(name##_)

// Wait until the grid before this one has ended and its writes can be seen. Before it, read only what no
// kernel of the step writes: weights. A no-op where the architecture has no dependent launch.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next grid start its prologue. Says nothing about memory.
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 16 bytes that are read once: past L1.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// d += a b: m16n8k16, half operands, float sums. Lane l: g = l / 4, t = l % 4.
//   a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//   b[0] = B[2t..][g], b[1] = B[2t + 8..][g];  d[0..1] = D[g][2t..], d[2..3] = D[g + 8][2t..]
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 half matrices from shared memory; lane l names row l % 8 of matrix l / 8 (16 bytes, aligned).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Copy 16 bytes to shared memory in the background; zeros where `valid` is false (the source is then not read).
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// The same of memory that is read in order: L2 fetches BYTES (128 or 256) around it.
template <int BYTES>
__device__ __forceinline__ void copy_async_ahead(void* shared, const void* global, bool valid = true) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if (BYTES == 256) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
  }
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's groups are still under way.
template <int N>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Ask for the 128 bytes around `address` to be in L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// 2^x to two units in the last place; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, as if unknown until here: what is computed from it in a loop is not kept in registers between turns.
__device__ __forceinline__ int fresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Bytes FIRST and SECOND of four signed ones, as halves, exactly: 1024 + (byte + 128) is a bit pattern.
template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t bytes_to_half2(uint32_t bytes) {
  uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, FIRST | 0x40 | SECOND << 8 | 0x4000);
  uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(biased), "r"(0x64806480u));
  return result;
}
#endif

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&h);
}

#ifdef WICORE_EMULATED
__device__ __forceinline__ float exp2_approx(float x) {
  float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

__device__ __forceinline__ int fresh(int x) { return x; }

template <int FIRST, int SECOND>
__device__ __forceinline__ uint32_t bytes_to_half2(uint32_t bytes) {
  return pack_half2(static_cast<signed char>(bytes >> 8 * FIRST), static_cast<signed char>(bytes >> 8 * SECOND));
}
#endif

// Sum over the 32 lanes, the same in every lane and in a fixed order.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, mask));
  return v;
}

// Sum over a block of whole warps; `scratch` holds a float a warp. Every thread must call it.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_sum(v);
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}
