// What the attention kernels share: where a vector lies in the paged pool, and tiles in shared memory.
//
// Macros: HEADS, KV_HEADS, HEAD_DIM (a multiple of 16), BLOCK_TOKENS (a multiple of 16), INT8 (0: halves).
#pragma once
#include "common.cuh"

constexpr int GROUP = HEADS / KV_HEADS;  // query heads that share a K and V head
constexpr float LOG2E = 1.4426950408889634f;

constexpr int VECTOR_BYTES = HEAD_DIM * (INT8 ? 1 : 2);
constexpr int CHUNKS = VECTOR_BYTES / 16;  // 16-byte pieces of a stored vector
constexpr long long CODES_BYTES = static_cast<long long>(KV_HEADS) * BLOCK_TOKENS * VECTOR_BYTES;
constexpr long long PART_BYTES = CODES_BYTES + (INT8 ? KV_HEADS * BLOCK_TOKENS * 4 : 0);

// A tile of rows in shared memory whose 8 rows of one column of 16-byte pieces lie in different banks.
template <int PIECES>
struct Tile {
  static constexpr bool SWIZZLED = PIECES % 8 == 0;
  static constexpr int STRIDE = (SWIZZLED ? PIECES : PIECES | 1) * 16;  // bytes a row
  static __device__ __forceinline__ int at(int row, int piece) {
    return row * STRIDE + (SWIZZLED ? piece ^ (row & 7) : piece) * 16;
  }
  // at(row, piece + 2 k) from at(row, piece), where piece is 0 or 1: few registers serve all k.
  static __device__ __forceinline__ int pairs_on(int at, int k) {
    return SWIZZLED ? (at ^ k % 4 * 32) + k / 4 * 128 : at + k * 32;
  }
};

// One pool as a layer sees it: `device` and `host` hold blocks of `block_bytes`; a table's first `streamed`
// entries are blocks of `host`.
struct Pool {
  const char* device;
  const char* host;
  long long block_bytes;
  const int* table;  // entry of logical block 0
  int streamed;

  __device__ __forceinline__ const char* block(int logical) const {
    return (logical < streamed ? host : device) + table[logical] * block_bytes;
  }
};

// Byte offset in a block's part (K or V of a layer) of a head's vector at a position.
__device__ __forceinline__ long long vector_at(int kv_head, int position) {
  return static_cast<long long>(kv_head * BLOCK_TOKENS + position % BLOCK_TOKENS) * VECTOR_BYTES;
}

__device__ __forceinline__ long long scale_at(int kv_head, int position) {
  return CODES_BYTES + (kv_head * BLOCK_TOKENS + position % BLOCK_TOKENS) * 4;
}
