// What hopper.cuh is made of, one by one.
//
// requires: sm_90a
#define CLUSTER 1
#define THREADS 128
#define SHARED_BYTES (1024 + 2 * 16 * 128)

#include "hopper.cuh"

WGMMA_OF_REGISTERS(128)

// y[64][128] = 1 + a[64][16] b[16][128]. `hasty`: writes the registers of A before the product is done.
extern "C" __global__ void multiply_registers(const half* a, const __grid_constant__ TensorMap b, float* y,
                                              int hasty) {
  SHARED_MEMORY(char, memory);
  const uint32_t shared = shared_begin(memory), full = shared, tile = shared + 1024;
  const int thread = block_thread(), row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  if (thread == 0) {
    barrier_init(full, 1);
    barrier_init_fence();
  }
  cluster_sync();
  if (thread == 0) {
    barrier_expect(full, 2 * 16 * 128);
    for (int panel = 0; panel < 2; ++panel) copy_box(tile + panel * 16 * 128, b, panel * 64, 0, full);
  }
  uint32_t pieces[1][4];
  for (int i = 0; i < 4; ++i)
    pieces[0][i] = *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * 16 + column + i / 2 * 8);
  float sums[64];
  for (int i = 0; i < 64; ++i) sums[i] = 1.0f;
  barrier_wait(full, 0);
  wgmma_fence();
  wgmma(sums, pieces[0], transposed_descriptor(tile, 16 * 128));
  wgmma_commit();
  if (hasty) pieces[0][1] = 0;
  wgmma_wait<0>();
  wgmma_settled(sums);
  wgmma_settled(pieces);
  for (int i = 0; i < 64; ++i) y[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + column + i % 2] = sums[i];
}

// Each thread's number, from the thread of the other warp that waited for, or came by, the same barrier.
extern "C" __global__ void swap_numbers(int* y) {
  SHARED_MEMORY(char, memory);
  const uint32_t shared = shared_begin(memory);
  const int thread = block_thread(), warp = thread / 32;
  if (warp < 2) {
    *static_cast<int*>(shared_pointer(shared + 4 * thread)) = thread;
    if (warp == 0) {
      named_barrier_wait(9, 64);
      y[thread] = *static_cast<int*>(shared_pointer(shared + 4 * (thread + 32)));
    } else {
      named_barrier_arrive(9, 64);
    }
  }
}
