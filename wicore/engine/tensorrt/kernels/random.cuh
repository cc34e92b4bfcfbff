// Counter-based random numbers.
#pragma once
#include "common.cuh"

// Philox4x32-10: 128 random bits for each counter and key. Salmon, Moraes, Dror, Shaw: "Parallel random
// numbers: as easy as 1, 2, 3", SC'11; wicore.sampling.philox is the same.
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int turn = 0; turn < 10; ++turn) {
    unsigned long long p0 = static_cast<unsigned long long>(counter.x) * 0xD2511F53u;
    unsigned long long p1 = static_cast<unsigned long long>(counter.z) * 0xCD9E8D57u;
    counter = make_uint4(static_cast<uint32_t>(p1 >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(p1),
                         static_cast<uint32_t>(p0 >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(p0));
    key.x += 0x9E3779B9u, key.y += 0xBB67AE85u;
  }
  return counter;
}
