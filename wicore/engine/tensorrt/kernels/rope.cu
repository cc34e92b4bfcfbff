// RoPE tables, and what happens to a row's q, k and v before attention: RMSNorm and RoPE of the heads of q
// and k, q to half, k and v into the row's block of the pool. RoPE: Su et al., 2021 (arXiv:2104.09864).
//
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=16 INT8=0
// variant: HEADS=4 KV_HEADS=1 HEAD_DIM=256 BLOCK_TOKENS=32 INT8=1
#include "attention.cuh"

constexpr int HALF_DIM = HEAD_DIM / 2;

// cos and sin [2 kinds][kind_rows][HEAD_DIM / 2] of position * inverse_frequencies [2 kinds][HEAD_DIM / 2];
// rows at position -1 are left alone.
extern "C" __global__ void rope_table(int rows, int kind_rows, const int* positions,
                                      const float* inverse_frequencies, float* cosines, float* sines) {
  pdl_wait();
  pdl_launch();
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= 2 * rows * HALF_DIM) return;
  int dim = i % HALF_DIM, row = i / HALF_DIM % rows, kind = i / HALF_DIM / rows;
  int position = positions[row];
  if (position < 0) return;
  float angle = static_cast<float>(position) * inverse_frequencies[kind * HALF_DIM + dim];
  long long to = (static_cast<long long>(kind) * kind_rows + row) * HALF_DIM + dim;
  cosines[to] = cosf(angle);
  sines[to] = sinf(angle);
}

// Lanes a head: each has 8 dims of the first half and the 8 that RoPE pairs them with.
constexpr int PIECES = HALF_DIM / 8;
constexpr int LANES = PIECES <= 1 ? 1 : PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : 16;

__device__ __forceinline__ void load_halves(float (&x)[8], const half* from) {
  uint4 v = *reinterpret_cast<const uint4*>(from);
  const half2* h = reinterpret_cast<const half2*>(&v);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 f = __half22float2(h[i]);
    x[2 * i] = f.x, x[2 * i + 1] = f.y;
  }
}

__device__ __forceinline__ void load_floats(float (&x)[8], const float* from) {
  float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void store_halves(void* to, const float (&x)[8]) {
  uint4 v;
  v.x = pack_half2(x[0], x[1]), v.y = pack_half2(x[2], x[3]);
  v.z = pack_half2(x[4], x[5]), v.w = pack_half2(x[6], x[7]);
  *static_cast<uint4*>(to) = v;
}

__device__ __forceinline__ uint32_t code(float x, float scale) {
  return static_cast<uint32_t>(static_cast<int>(rintf(x / scale))) & 0xffu;
}

__device__ __forceinline__ void store_codes(void* to, const float (&x)[8], float scale) {
  uint2 v;
  v.x = code(x[0], scale) | code(x[1], scale) << 8 | code(x[2], scale) << 16 | code(x[3], scale) << 24;
  v.y = code(x[4], scale) | code(x[5], scale) << 8 | code(x[6], scale) << 16 | code(x[7], scale) << 24;
  *static_cast<uint2*>(to) = v;
}

// qkv half [rows][(HEADS + 2 KV_HEADS) * HEAD_DIM] -> q half [rows][HEADS][HEAD_DIM] and the pool.
//
// `pool` begins at the layer's part of block 0; `offset` and `first` (null: 0) place a sequence's table in
// `tables`; `cosines` and `sines` are those of the layer's kind. LANES lanes have a head.
extern "C" __global__ void append_kv(int rows, const half* qkv, const float* q_norm, const float* k_norm,
                                     float eps, const float* cosines, const float* sines, half* q, char* pool,
                                     long long block_bytes, const int* positions, const int* row_seq,
                                     const int* offset, const int* first, const int* tables) {
  constexpr int ALL = HEADS + 2 * KV_HEADS;
  pdl_wait();
  pdl_launch();
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  int lane = i % LANES, head = i / LANES % ALL, row = i / LANES / ALL;
  int position = row < rows ? positions[row] : -1;
  bool active = position >= 0 && lane < PIECES;
  bool is_q = head < HEADS, is_v = head >= HEADS + KV_HEADS;
  int dim = lane * 8;

  float a[8] = {}, b[8] = {};
  if (active) {
    const half* x = qkv + (static_cast<long long>(row) * ALL + head) * HEAD_DIM + dim;
    load_halves(a, x);
    load_halves(b, x + HALF_DIM);
  }
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j++) sum = fmaf(a[j], a[j], fmaf(b[j], b[j], sum));
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (active && !is_v) {
    float inverse = 1.0f / sqrtf(sum / HEAD_DIM + eps);
    const float* norm = is_q ? q_norm : k_norm;
    float low[8], high[8], c[8], s[8];
    load_floats(low, norm + dim);
    load_floats(high, norm + HALF_DIM + dim);
    load_floats(c, cosines + static_cast<long long>(row) * HALF_DIM + dim);
    load_floats(s, sines + static_cast<long long>(row) * HALF_DIM + dim);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float x = a[j] * inverse * low[j], y = b[j] * inverse * high[j];
      a[j] = x * c[j] - y * s[j];
      b[j] = y * c[j] + x * s[j];
    }
  }
#if INT8
  float most = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; j++) most = fmaxf(most, fmaxf(fabsf(a[j]), fabsf(b[j])));
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, mask));
#endif
  if (!active) return;
  if (is_q) {
    half* to = q + (static_cast<long long>(row) * HEADS + head) * HEAD_DIM + dim;
    store_halves(to, a);
    store_halves(to + HALF_DIM, b);
    return;
  }
  int sequence = row_seq[row], logical = position / BLOCK_TOKENS;
  int entry = offset[sequence] + logical - (first ? first[sequence] : 0);
  char* part = pool + tables[entry] * block_bytes + (is_v ? PART_BYTES : 0);
  int kv_head = is_v ? head - HEADS - KV_HEADS : head - HEADS;
  char* to = part + vector_at(kv_head, position);
#if INT8
  float scale = fmaxf(most * (1.0f / 127.0f), 1e-20f);
  store_codes(to + dim, a, scale);
  store_codes(to + HALF_DIM + dim, b, scale);
  if (lane == 0) *reinterpret_cast<float*>(part + scale_at(kv_head, position)) = scale;
#else
  store_halves(to + dim * 2, a);
  store_halves(to + (HALF_DIM + dim) * 2, b);
#endif
}
