// Copies memory, to measure how fast that goes.
// variant:
#include "common.cuh"

// `count` times 16 bytes; any grid. Four loads are under way in each thread.
extern "C" __global__ void __launch_bounds__(512) copy_words(const uint4* from, uint4* to, long long count) {
  pdl_wait();
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < count; i += 4 * stride) {
    uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride], d = from[i + 3 * stride];
    to[i] = a;
    to[i + stride] = b;
    to[i + 2 * stride] = c;
    to[i + 3 * stride] = d;
  }
  for (; i < count; i += stride) to[i] = from[i];
}
