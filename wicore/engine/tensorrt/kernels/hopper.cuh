// Instructions of Hopper (sm_90a) alone: barriers in shared memory that count bytes, the bulk copy engine,
// matrix products of a whole warpgroup, clusters. Each has a twin in the CPU emulation.
//
// Shared memory is named by 32-bit addresses. The kernel defines before including this:
//   THREADS       threads a block
//   CLUSTER       blocks a cluster
//   SHARED_BYTES  shared memory a block uses, from the address that `shared_begin` returns
// and after it says which products it makes, by WGMMA_OF_TILES(columns) and WGMMA_OF_REGISTERS(columns).
// PTX ISA: sections on wgmma (matrix descriptor, canonical layouts), mbarrier and cp.async.bulk.tensor.
#pragma once

#include "common.cuh"

#define WGMMA_PASTE_(a, b) a##b
#define WGMMA_PASTE(a, b) WGMMA_PASTE_(a, b)
#define WGMMA_STRING_(a) #a
#define WGMMA_STRING(a) WGMMA_STRING_(a)

// Descriptor of an operand tile whose rows are 64 half values (128 bytes), K contiguous, swizzled by 128
// bytes, with groups of 8 rows 1024 bytes apart. `address` may be advanced by 32 bytes for each 16 values of
// K: the swizzle goes by the address, and tiles are aligned to its period of 1024 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4)  // start
         | 1ull << 16                                      // leading dimension: of no meaning here
         | 64ull << 32                                     // stride: 1024 bytes
         | 1ull << 62;                                     // swizzle of 128 bytes
}

// The same of a tile of B whose rows are K: rows of 64 columns of the product, and the next 64 columns
// `panel_bytes` further on. `address` may be advanced by 2048 bytes for each 16 values of K.
__device__ __forceinline__ uint64_t transposed_descriptor(uint32_t address, uint32_t panel_bytes) {
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         64ull << 32 | 1ull << 62;
}

#ifndef WICORE_EMULATED

// What cuTensorMapEncodeTiled makes.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// The block's shared memory from the first address aligned to the period of the swizzle.
__device__ __forceinline__ uint32_t shared_begin(char* memory) {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + 1023u) & ~1023u;
}

__device__ __forceinline__ void* shared_pointer(uint32_t address) {
  return __cvta_shared_to_generic(address);
}

__device__ __forceinline__ int block_thread() { return threadIdx.x; }

__device__ __forceinline__ int cluster_rank() {
#if CLUSTER > 1
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ int cluster_index() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ int cluster_count() { return gridDim.x / CLUSTER; }

// All threads of the cluster; writes to shared memory before it are seen after it.
__device__ __forceinline__ void cluster_sync() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Make initialised barriers known to the copy engine and to the cluster; a `cluster_sync` must follow.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrive, and let the phase last until so many more bytes have been copied in.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive at the barrier that lies at the same address in block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra ended;\n\t"
      "bra again;\n\t"
      "ended:\n\t}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Until `count` threads, whole warps, have come to this barrier of the block (1 to 15): by waiting, or by
// `named_barrier_arrive`.
__device__ __forceinline__ void named_barrier_wait(int barrier, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int barrier, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(count) : "memory");
}

// What this thread has stored to shared memory is seen by products and by the copy engine.
__device__ __forceinline__ void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copy the box at (column, row) to shared memory; zeros beyond the matrix. Its bytes count at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t target, const TensorMap& map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same to the same addresses in each block of the cluster whose bit is set in `blocks`, counting at each
// one's barrier.
__device__ __forceinline__ void copy_box_to(uint32_t target, const TensorMap& map, int column, int row,
                                            uint32_t barrier, uint32_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<unsigned short>(blocks))
      : "memory");
}

// Give registers up, or wait until others have: every thread of a warpgroup.
template <int REGISTERS>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Before the first product that touches registers which the thread has written or read.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most N of the warpgroup's groups are still under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The first N / 2 sums of a thread as operands, from %3 on, and the array elements that they are.
#define WGMMA_TEXT_8 "%3, %4, %5, %6"
#define WGMMA_TEXT_16 WGMMA_TEXT_8 ", %7, %8, %9, %10"
#define WGMMA_TEXT_24 WGMMA_TEXT_16 ", %11, %12, %13, %14"
#define WGMMA_TEXT_32 WGMMA_TEXT_24 ", %15, %16, %17, %18"
#define WGMMA_TEXT_40 WGMMA_TEXT_32 ", %19, %20, %21, %22"
#define WGMMA_TEXT_48 WGMMA_TEXT_40 ", %23, %24, %25, %26"
#define WGMMA_TEXT_56 WGMMA_TEXT_48 ", %27, %28, %29, %30"
#define WGMMA_TEXT_64 WGMMA_TEXT_56 ", %31, %32, %33, %34"
#define WGMMA_TEXT_72 WGMMA_TEXT_64 ", %35, %36, %37, %38"
#define WGMMA_TEXT_80 WGMMA_TEXT_72 ", %39, %40, %41, %42"
#define WGMMA_TEXT_88 WGMMA_TEXT_80 ", %43, %44, %45, %46"
#define WGMMA_TEXT_96 WGMMA_TEXT_88 ", %47, %48, %49, %50"
#define WGMMA_TEXT_104 WGMMA_TEXT_96 ", %51, %52, %53, %54"
#define WGMMA_TEXT_112 WGMMA_TEXT_104 ", %55, %56, %57, %58"
#define WGMMA_TEXT_120 WGMMA_TEXT_112 ", %59, %60, %61, %62"
#define WGMMA_TEXT_128 WGMMA_TEXT_120 ", %63, %64, %65, %66"
#define WGMMA_TEXT_136 WGMMA_TEXT_128 ", %67, %68, %69, %70"
#define WGMMA_TEXT_144 WGMMA_TEXT_136 ", %71, %72, %73, %74"
#define WGMMA_TEXT_152 WGMMA_TEXT_144 ", %75, %76, %77, %78"
#define WGMMA_TEXT_160 WGMMA_TEXT_152 ", %79, %80, %81, %82"
#define WGMMA_TEXT_168 WGMMA_TEXT_160 ", %83, %84, %85, %86"
#define WGMMA_TEXT_176 WGMMA_TEXT_168 ", %87, %88, %89, %90"
#define WGMMA_TEXT_184 WGMMA_TEXT_176 ", %91, %92, %93, %94"
#define WGMMA_TEXT_192 WGMMA_TEXT_184 ", %95, %96, %97, %98"
#define WGMMA_TEXT_200 WGMMA_TEXT_192 ", %99, %100, %101, %102"
#define WGMMA_TEXT_208 WGMMA_TEXT_200 ", %103, %104, %105, %106"
#define WGMMA_TEXT_216 WGMMA_TEXT_208 ", %107, %108, %109, %110"
#define WGMMA_TEXT_224 WGMMA_TEXT_216 ", %111, %112, %113, %114"
#define WGMMA_TEXT_232 WGMMA_TEXT_224 ", %115, %116, %117, %118"
#define WGMMA_TEXT_240 WGMMA_TEXT_232 ", %119, %120, %121, %122"
#define WGMMA_TEXT_248 WGMMA_TEXT_240 ", %123, %124, %125, %126"
#define WGMMA_TEXT_256 WGMMA_TEXT_248 ", %127, %128, %129, %130"
#define WGMMA_FOUR(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_8(d) WGMMA_FOUR(d, 0)
#define WGMMA_SUMS_16(d) WGMMA_SUMS_8(d), WGMMA_FOUR(d, 4)
#define WGMMA_SUMS_24(d) WGMMA_SUMS_16(d), WGMMA_FOUR(d, 8)
#define WGMMA_SUMS_32(d) WGMMA_SUMS_24(d), WGMMA_FOUR(d, 12)
#define WGMMA_SUMS_40(d) WGMMA_SUMS_32(d), WGMMA_FOUR(d, 16)
#define WGMMA_SUMS_48(d) WGMMA_SUMS_40(d), WGMMA_FOUR(d, 20)
#define WGMMA_SUMS_56(d) WGMMA_SUMS_48(d), WGMMA_FOUR(d, 24)
#define WGMMA_SUMS_64(d) WGMMA_SUMS_56(d), WGMMA_FOUR(d, 28)
#define WGMMA_SUMS_72(d) WGMMA_SUMS_64(d), WGMMA_FOUR(d, 32)
#define WGMMA_SUMS_80(d) WGMMA_SUMS_72(d), WGMMA_FOUR(d, 36)
#define WGMMA_SUMS_88(d) WGMMA_SUMS_80(d), WGMMA_FOUR(d, 40)
#define WGMMA_SUMS_96(d) WGMMA_SUMS_88(d), WGMMA_FOUR(d, 44)
#define WGMMA_SUMS_104(d) WGMMA_SUMS_96(d), WGMMA_FOUR(d, 48)
#define WGMMA_SUMS_112(d) WGMMA_SUMS_104(d), WGMMA_FOUR(d, 52)
#define WGMMA_SUMS_120(d) WGMMA_SUMS_112(d), WGMMA_FOUR(d, 56)
#define WGMMA_SUMS_128(d) WGMMA_SUMS_120(d), WGMMA_FOUR(d, 60)
#define WGMMA_SUMS_136(d) WGMMA_SUMS_128(d), WGMMA_FOUR(d, 64)
#define WGMMA_SUMS_144(d) WGMMA_SUMS_136(d), WGMMA_FOUR(d, 68)
#define WGMMA_SUMS_152(d) WGMMA_SUMS_144(d), WGMMA_FOUR(d, 72)
#define WGMMA_SUMS_160(d) WGMMA_SUMS_152(d), WGMMA_FOUR(d, 76)
#define WGMMA_SUMS_168(d) WGMMA_SUMS_160(d), WGMMA_FOUR(d, 80)
#define WGMMA_SUMS_176(d) WGMMA_SUMS_168(d), WGMMA_FOUR(d, 84)
#define WGMMA_SUMS_184(d) WGMMA_SUMS_176(d), WGMMA_FOUR(d, 88)
#define WGMMA_SUMS_192(d) WGMMA_SUMS_184(d), WGMMA_FOUR(d, 92)
#define WGMMA_SUMS_200(d) WGMMA_SUMS_192(d), WGMMA_FOUR(d, 96)
#define WGMMA_SUMS_208(d) WGMMA_SUMS_200(d), WGMMA_FOUR(d, 100)
#define WGMMA_SUMS_216(d) WGMMA_SUMS_208(d), WGMMA_FOUR(d, 104)
#define WGMMA_SUMS_224(d) WGMMA_SUMS_216(d), WGMMA_FOUR(d, 108)
#define WGMMA_SUMS_232(d) WGMMA_SUMS_224(d), WGMMA_FOUR(d, 112)
#define WGMMA_SUMS_240(d) WGMMA_SUMS_232(d), WGMMA_FOUR(d, 116)
#define WGMMA_SUMS_248(d) WGMMA_SUMS_240(d), WGMMA_FOUR(d, 120)
#define WGMMA_SUMS_256(d) WGMMA_SUMS_248(d), WGMMA_FOUR(d, 124)

// d (+)= A B^T for 64 rows of A, N rows of B and 16 values of K, both by descriptor; `add` 0 forgets d.
// Runs in the background. Warp w of the warpgroup, lane l, g = l / 4, t = l % 4:
//   d[4j], d[4j + 1] = D[16w + g][8j + 2t], [8j + 2t + 1];  d[4j + 2], d[4j + 3]: the same of row + 8
// The inputs are named as outputs too, so that they come first and the sums have the same numbers at every N.
#define WGMMA_OF_TILES(N)                                                                                  \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, uint32_t add) {         \
    asm volatile(                                                                                          \
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %2, 0;\n\t"                                               \
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_STRING(N) "k16.f32.f16.f16 "                             \
        "{" WGMMA_PASTE(WGMMA_TEXT_, N) "}, %0, %1, add, 1, 1, 0, 0;\n\t}"                                 \
        : "+l"(a), "+l"(b), "+r"(add), WGMMA_PASTE(WGMMA_SUMS_, N)(d));                                    \
  }

// d += A B for 16 values of K: 64 rows of A in registers, laid out as mma_16816's, and N columns of B by
// `transposed_descriptor`. The registers must stay until the product is waited for.
#define WGMMA_OF_REGISTERS(N)                                                                              \
  __device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {           \
    uint32_t unused[2] = {};                                                                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" WGMMA_STRING(N) "k16.f32.f16.f16 "                    \
                 "{" WGMMA_PASTE(WGMMA_TEXT_, N) "}, {" WGMMA_PASTE(WGMMA_A_, N) "}, %0, 1, 1, 1, 1;"        \
                 : "+l"(b), "+r"(unused[0]), "+r"(unused[1]), WGMMA_PASTE(WGMMA_SUMS_, N)(d)               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));                                            \
  }

// A in registers, behind so many sums.
#define WGMMA_A_16 "%11, %12, %13, %14"
#define WGMMA_A_32 "%19, %20, %21, %22"
#define WGMMA_A_48 "%27, %28, %29, %30"
#define WGMMA_A_64 "%35, %36, %37, %38"
#define WGMMA_A_80 "%43, %44, %45, %46"
#define WGMMA_A_96 "%51, %52, %53, %54"
#define WGMMA_A_112 "%59, %60, %61, %62"
#define WGMMA_A_128 "%67, %68, %69, %70"
#define WGMMA_A_256 "%131, %132, %133, %134"

// Nothing that reads d may move before this.
template <int SUMS>
__device__ __forceinline__ void wgmma_settled(float (&d)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Nothing that writes the registers of A may move before this.
template <int PIECES>
__device__ __forceinline__ void wgmma_settled(uint32_t (&a)[PIECES][4]) {
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[i][j])::"memory");
}

// One of two values without a branch; a conditional expression may become one that copies all sums first.
__device__ __forceinline__ float choose(int first, float a, float b) {
  float v;
  asm("{\n\t.reg .pred first;\n\tsetp.ne.s32 first, %1, 0;\n\tselp.f32 %0, %2, %3, first;\n\t}"
      : "=f"(v)
      : "r"(first), "f"(a), "f"(b));
  return v;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else
#include "hopper_emulation.h"
#endif

// Row and column of a quarter of lanes are exchanged: value i of lane t (of four) and value t of lane i.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4], int t) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    bool high = t & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      uint32_t got = __shfl_xor_sync(0xffffffffu, high ? v[i] : v[i + bit], bit);
      if (high) {
        v[i] = got;
      } else {
        v[i + bit] = got;
      }
    }
  }
}
