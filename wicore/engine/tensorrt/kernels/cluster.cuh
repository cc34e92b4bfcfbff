// Clusters: SIZE consecutive blocks of THREADS threads, side by side on the card, that read each other's shared
// memory (compute capability 9). In the emulation one launched block stands for a whole cluster: SIZE * THREADS
// threads and SIZE times the shared memory.
#pragma once

#include "common.cuh"

#ifndef WICORE_EMULATED
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define CLUSTER_DIMS(size)  // compiles, and must not be launched
#else
#define CLUSTER_DIMS(size) __cluster_dims__(size, 1, 1)
#endif

template <int SIZE, int THREADS>
struct Cluster {
  static __device__ __forceinline__ int thread() { return threadIdx.x; }
  static __device__ __forceinline__ int rank() { return blockIdx.x % SIZE; }
  static __device__ __forceinline__ int index() { return blockIdx.x / SIZE; }

  // This block's part of what SHARED_MEMORY gives.
  template <typename T>
  static __device__ __forceinline__ T* own(T* shared, int) {
    return shared;
  }

  // Until every thread of the cluster is here; orders their accesses to shared memory.
  static __device__ __forceinline__ void sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
  }

  // Two floats of block `from`, at the place that `shared` is in this one.
  static __device__ __forceinline__ float2 load(const float* shared, int from, int) {
    float2 v = {};
#if __CUDA_ARCH__ >= 900
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile(
        "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %2, %3;\n\t"
        "ld.shared::cluster.v2.f32 {%0, %1}, [there];\n\t}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(address), "r"(from)
        : "memory");
#endif
    return v;
  }
};

#else
#define CLUSTER_DIMS(size)

template <int SIZE, int THREADS>
struct Cluster {
  static int thread() { return threadIdx.x % THREADS; }
  static int rank() { return threadIdx.x / THREADS; }
  static int index() { return blockIdx.x; }
  template <typename T>
  static T* own(T* shared, int bytes) {
    return shared + rank() * (bytes / sizeof(T));
  }
  static void sync() { __syncthreads(); }
  static float2 load(const float* shared, int from, int bytes) {
    return *reinterpret_cast<const float2*>(shared + (from - rank()) * (bytes / 4));
  }
};
#endif
