// Kernels that try what kernels are made of (tests/kernels/test_instructions.py) and, in the emulation only, what
// no kernel may do (test_emulation.py).
#include "common.cuh"

// One warp: D = A B for A [16][16], B [16][8] halves, D [16][8] floats.
extern "C" __global__ void multiply(const half* a, const half* b, float* d) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  uint32_t fa[4], fb[2];
  float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  for (int i = 0; i < 4; ++i)
    fa[i] = *reinterpret_cast<const uint32_t*>(&a[(g + i % 2 * 8) * 16 + t + i / 2 * 8]);
  for (int i = 0; i < 2; ++i) {
    half2 pair = {b[(t + i * 8) * 8 + g], b[(t + i * 8 + 1) * 8 + g]};
    fb[i] = *reinterpret_cast<uint32_t*>(&pair);
  }
  mma_16816(sums, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t + i % 2] = sums[i];
}

// The same through copy_async and ldmatrix: A as four matrices, B (row-major) transposed on the way.
extern "C" __global__ void multiply_from_shared(const half* a, const half* b, float* d) {
  SHARED_MEMORY(half, tile);  // A [16][16], then B [16][8]
  int lane = threadIdx.x;
  copy_async(tile + lane * 8, a + lane * 8);
  copy_async(tile + 256 + lane % 16 * 8, b + lane % 16 * 8);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, tile + (lane % 16) * 16 + lane / 16 * 8);
  ldmatrix_x4_trans(fb, tile + 256 + (lane % 16) * 8);
  float sums[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  const uint32_t pair[2] = {fb[0], fb[1]};
  mma_16816(sums, fa, pair);
  int g = lane / 4, t = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t + i % 2] = sums[i];
}

extern "C" __global__ void shuffles(const int* x, int* y) {
  int lane = threadIdx.x, n = blockDim.x;
  y[lane] = __shfl_xor_sync(0xffffffffu, x[lane], 5);
  y[n + lane] = __shfl_sync(0xffffffffu, x[lane], lane + 3, 8);
  y[2 * n + lane] = __shfl_down_sync(0xffffffffu, x[lane], 7);
  y[3 * n + lane] = __shfl_up_sync(0xffffffffu, x[lane], 7, 16);
  y[4 * n + lane] = static_cast<int>(__ballot_sync(0xffffffffu, x[lane] > 50));
  y[5 * n + lane] = __any_sync(0xffffffffu, x[lane] > 98) + 2 * __all_sync(0xffffffffu, x[lane] >= 0);
  y[6 * n + lane] = __reduce_max_sync(0xffffffffu, x[lane]);
  unsigned half_warp = lane % 32 < 16 ? 0xffffu : 0xffff0000u;
  y[7 * n + lane] = __reduce_add_sync(half_warp, x[lane]);
  y[8 * n + lane] = __syncthreads_count(x[lane] > 50) + __syncthreads_count(x[lane] > 70);
}

extern "C" __global__ void sum_rows(const float* x, float* y, int n) {
  __shared__ float scratch[32];
  float sum = 0.0f;
  pdl_launch();
  pdl_wait();
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

extern "C" __global__ void convert(const float* x, half* y, float* back, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    y[i] = __float2half_rn(x[i]);
    back[i] = __half2float(y[i]);
  }
}

extern "C" __global__ void count(unsigned long long* counter, int* turn) {
  atomicAdd(counter, 2ull);
  if (threadIdx.x == 0) turn[blockIdx.x] = atomicAdd(turn + gridDim.x, 1);
}

extern "C" __global__ void indices(int* y) {
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  y[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

#ifdef WICORE_EMULATED
// Every thread reads what the next one wrote; without the barrier that is not there yet.
template <bool kBarrier>
__device__ void turn(int* y) {
  __shared__ int cell[64];
  cell[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  y[blockIdx.x * 64 + threadIdx.x] = cell[(threadIdx.x + 63) % 64];
}
extern "C" __global__ void turn_with_barrier(int* y) { turn<true>(y); }
extern "C" __global__ void turn_without(int* y) { turn<false>(y); }

extern "C" __global__ void read_unwritten(float* y) {
  __shared__ float fixed[32];
  SHARED_MEMORY(float, dynamic);
  if (gridDim.x > 1) fixed[threadIdx.x] = 0.0f;
  y[threadIdx.x] = fixed[threadIdx.x];
  y[32 + threadIdx.x] = dynamic[threadIdx.x];
}

// Copies four groups and reads before the last two are waited for.
extern "C" __global__ void read_early(const float4* x, float4* y) {
  SHARED_MEMORY(float4, tile);
  for (int i = 0; i < 4; ++i) {
    copy_async(tile + i, x + i, i != 1);
    copy_commit();
  }
  copy_wait<2>();
  for (int i = 0; i < 4; ++i) y[i] = tile[i];
}

extern "C" __global__ void leave_barrier() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

extern "C" __global__ void leave_warp() {
  if (threadIdx.x == 3) return;
  __syncwarp();
}

extern "C" __global__ void wrong_mask() { __syncwarp(2u); }

extern "C" __global__ void spin(volatile int* flag) {
  while (*flag == 0) emulated_yield();
}

// Thread 0 waits for what the last thread writes: only fibres that take turns get through.
extern "C" __global__ void hand_over(volatile int* flag, int* y) {
  if (threadIdx.x == blockDim.x - 1) *flag = 7;
  while (*flag == 0) emulated_yield();
  y[threadIdx.x] = *flag;
}

extern "C" __global__ void write_shared(int at) {
  SHARED_MEMORY(char, bytes);
  bytes[at] = 1;
}

extern "C" __global__ void write_static(int at) {
  __shared__ volatile int cells[8];
  cells[at] = 1;
}

extern "C" __global__ void write_global(char* at) { at[threadIdx.x] = 1; }
extern "C" __global__ void read_wide(const char* at, uint4* y) { *y = *reinterpret_cast<const uint4*>(at); }

extern "C" __global__ void take_map(const __grid_constant__ CUtensorMap map, long long* y, char small, float last) {
  y[0] = static_cast<long long>(map.columns);
  y[1] = static_cast<long long>(map.box_rows);
  y[2] = small;
  y[3] = static_cast<long long>(last);
}
#endif
