// The vision tower's QKV to where hopper_attention.cu takes it from, and what that gives back.
//
// Macros: HEADS and HEAD_DIM of the tower, WIDTH of a head in the kernel, BLOCK_TOKENS of its pool.
// variant: HEADS=16 HEAD_DIM=72 WIDTH=128 BLOCK_TOKENS=128
// variant: HEADS=2 HEAD_DIM=12 WIDTH=128 BLOCK_TOKENS=128
#include "common.cuh"

constexpr int HIDDEN = HEADS * HEAD_DIM;
constexpr int PIECE = HEAD_DIM % 8 ? 1 : 8;  // halves that are moved together
constexpr int PIECES = HIDDEN / PIECE;

struct __align__(2 * PIECE) Piece {
  half values[PIECE];
};

// Where the first half of a patch's head lies among the kernel's queries: those of the patches' second half are
// heads between.
__device__ __forceinline__ long long query_at(int patch, int head, int patches) {
  const int rows = (patches + 1) / 2;
  return (static_cast<long long>(patch % rows) * (2 * HEADS) + 2 * head + patch / rows) * WIDTH;
}

// Grid: patches. qkv [patches][3][HEADS][HEAD_DIM]; q [rows][2 HEADS][WIDTH], scaled; kv: blocks of
// [2][HEADS][BLOCK_TOKENS][WIDTH]. What is behind HEAD_DIM is left as it is.
extern "C" __global__ void __launch_bounds__(256)
    spread_qkv(const half* qkv, half* q, half* kv, int patches, float scale) {
  pdl_launch();
  pdl_wait();
  const int patch = static_cast<int>(blockIdx.x);
  const Piece* from = reinterpret_cast<const Piece*>(qkv + static_cast<long long>(patch) * 3 * HIDDEN);
  for (int i = static_cast<int>(threadIdx.x); i < 3 * PIECES; i += 256) {
    const int part = i / PIECES, head = i % PIECES / (PIECES / HEADS), place = i % (PIECES / HEADS) * PIECE;
    Piece piece = from[i];
    half* to = q + query_at(patch, head, patches);
    if (part == 0) {
#pragma unroll
      for (int j = 0; j < PIECE; ++j) piece.values[j] = __float2half_rn(__half2float(piece.values[j]) * scale);
    } else {
      const long long vector = (static_cast<long long>(patch / BLOCK_TOKENS) * 2 + part - 1) * HEADS + head;
      to = kv + (vector * BLOCK_TOKENS + patch % BLOCK_TOKENS) * WIDTH;
    }
    *reinterpret_cast<Piece*>(to + place) = piece;
  }
}

// Grid: patches. out as q of spread_qkv; attended [patches][HEADS][HEAD_DIM].
extern "C" __global__ void __launch_bounds__(256) gather_heads(const half* out, half* attended, int patches) {
  pdl_launch();
  pdl_wait();
  const int patch = static_cast<int>(blockIdx.x);
  Piece* to = reinterpret_cast<Piece*>(attended + static_cast<long long>(patch) * HIDDEN);
  for (int i = static_cast<int>(threadIdx.x); i < PIECES; i += 256) {
    const int head = i / (PIECES / HEADS), place = i % (PIECES / HEADS) * PIECE;
    to[i] = *reinterpret_cast<const Piece*>(out + query_at(patch, head, patches) + place);
  }
}
