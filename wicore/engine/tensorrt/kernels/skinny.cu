// y = x w^T for 1 to 64 rows of x, at the speed at which w can be read.
//
// Rows of w are the m of the tensor core's product and rows of x ("tokens") its n, so that one instruction serves
// 16 rows of w for 8 tokens. A block owns TILE rows of w and all tokens. Both operands stream through a ring of
// STAGES stages in shared memory; a stage holds LINES * PARTS lines (64 values, 128 bytes of memory) of every row.
//
// Order of a sum, the same for any number of tokens and any setting but PARTS and CHAINS: part p takes the lines
// l with l mod PARTS = p; its chain c takes the c-th half of each (all of it where CHAINS is 1), in ascending order;
// the result is ((v_0 + v_1) + v_2) + ..., where v_p is the sum of the part's chains. PARTS and CHAINS must depend
// on n and k alone. A chain is one warp's; with CLUSTER a part is one block's, of a cluster of PARTS blocks that add up at the end.
//
// Macros, all of them needed:
//   NT       tiles of 8 tokens: 1, 2, 4 or 8
//   MT       tiles of 16 rows of w a warp
//   WM       warps over the rows of w: a block's tile is 16 * MT * WM rows
//   PARTS    parts of k: 1, 2 or 4
//   CHAINS   chains of a part: 1 or 2
//   LINES    lines of each part a stage
//   STAGES   stages of the ring
//   AHEAD    stages beyond the ring to ask into L2 while the kernel before still runs
//   EXACT    1: n is a multiple of the tile's columns, k of the values of a stage
//   SINGLE   1: no block has more than one tile, so that the sums may use the ring's memory
//   CLUSTER  1: the parts are split over a cluster (needs SINGLE and compute capability 9)
//   GLU      1: w is [2 n][k], gate rows before up rows, and y = half(gelu_tanh(gate) * up / 64), saturated
//   HALF_OUT 1: y is half
//   BLOCKS   blocks that must fit on a multiprocessor by their registers
//   FETCH    bytes of a row of w that L2 fetches at once: 128 or 256
//   SHARED   bytes of dynamic shared memory of a block
//
// variant: NT=1 MT=3 WM=1 PARTS=4 CHAINS=2 LINES=1 STAGES=4 AHEAD=4 EXACT=1 SINGLE=1 CLUSTER=0 GLU=0 HALF_OUT=0 BLOCKS=2 FETCH=256 SHARED=114688
// variant: NT=2 MT=4 WM=1 PARTS=4 CHAINS=1 LINES=1 STAGES=3 AHEAD=4 EXACT=1 SINGLE=1 CLUSTER=0 GLU=0 HALF_OUT=1 BLOCKS=2 FETCH=256 SHARED=114688
// variant: NT=4 MT=3 WM=4 PARTS=1 CHAINS=1 LINES=1 STAGES=3 AHEAD=4 EXACT=1 SINGLE=0 CLUSTER=0 GLU=1 HALF_OUT=1 BLOCKS=2 FETCH=256 SHARED=114688
// variant: NT=8 MT=3 WM=4 PARTS=1 CHAINS=1 LINES=1 STAGES=3 AHEAD=4 EXACT=0 SINGLE=0 CLUSTER=0 GLU=0 HALF_OUT=0 BLOCKS=1 FETCH=128 SHARED=196608
// variant: NT=8 MT=2 WM=2 PARTS=1 CHAINS=2 LINES=2 STAGES=2 AHEAD=4 EXACT=0 SINGLE=0 CLUSTER=0 GLU=0 HALF_OUT=0 BLOCKS=2 FETCH=128 SHARED=98304
#include "cluster.cuh"

constexpr int kTokens = 8 * NT;
constexpr int kTile = 16 * MT * WM;
constexpr int kParts = CLUSTER ? 1 : PARTS;  // of a block
constexpr int kChains = CHAINS * kParts;
constexpr int kThreads = 32 * WM * kChains;
constexpr int kLines = LINES * kParts;      // of a stage and row
constexpr int kLine = 64;                   // values of a line
constexpr int kPieces = kLine / 8 * kLines;  // 16-byte pieces of a stage and row
constexpr int kRowStep = kThreads / kPieces;
constexpr int kStageW = kLines * kTile * kLine, kStageX = kLines * kTokens * kLine;  // halves
constexpr int kStage = kStageW + kStageX;
constexpr int kOut = GLU ? kTile / 2 : kTile;  // columns of y
[[maybe_unused]] constexpr int kPass = NT == 1 || !SINGLE ? 8 : 16;  // tokens summed over the chains at once
constexpr int kPitch = kTile + 4;        // floats; 2 kPitch = 8 mod 32 banks
using Blocks = Cluster<CLUSTER ? PARTS : 1, kThreads>;
static_assert(kThreads % kPieces == 0, "a thread keeps to one column of pieces");
static_assert(kTile % kRowStep == 0, "all threads copy as many pieces of w");
static_assert(kRowStep % 4 == 0 && kOut % kRowStep == 0, "a thread's pieces are alike");
static_assert(!CLUSTER || SINGLE, "a cluster has one tile");

__device__ __forceinline__ float gelu_tanh(float g) {
  return 0.5f * g * (1.0f + tanhf(0.7978845608028654f * (g + 0.044715f * g * g * g)));
}

// Into the range of half; NaN stays.
__device__ __forceinline__ float saturate(float v) { return v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v; }

__device__ __forceinline__ float gated(float gate, float up) { return saturate(gelu_tanh(gate) * up * 0.015625f); }

__device__ __forceinline__ void store_pair(void* y, long long i, float a, float b) {
  if (HALF_OUT || GLU) {
    *reinterpret_cast<uint32_t*>(static_cast<half*>(y) + i) = pack_half2(a, b);
  } else {
    *reinterpret_cast<float2*>(static_cast<float*>(y) + i) = make_float2(a, b);
  }
}

__device__ __forceinline__ float2 add_pair(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

// A thread's copies: a column of 16-byte pieces of each stage.
struct Copier {
  const half* w_from;  // the first piece's, of the next stage to copy
  const half* x_from;
  int column, at;  // row of w and index in k of the first piece
  int to;          // its place in the stage

  __device__ __forceinline__ Copier(const half* x, const half* w, int tile, int part, int k) {
    const int thread = Blocks::thread(), line = thread % kPieces / 8, chunk = thread % 8, row = thread / kPieces;
    column = tile * kOut + row;
    at = (CLUSTER ? line * PARTS + part : line) * kLine + chunk * 8;
    w_from = w + static_cast<long long>(column) * k + at;
    x_from = x + static_cast<long long>(row) * k + at;
    to = (line * kTile + row) * kLine + (chunk ^ (row & 7)) * 8;
  }

  // Where piece i goes, if the first goes to `first`: pieces of a row are in the order of their number xor row mod 8.
  static __device__ __forceinline__ int place(int first, int i) {
    return (first ^ (i * kRowStep & 4) * 8) + i * kRowStep * kLine;
  }

  __device__ __forceinline__ void copy_w(half* stage, int n, int k) const {
    constexpr int kCount = kTile / kRowStep, kGates = GLU ? kCount / 2 : kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      long long row = i < kGates ? i * kRowStep : n + (i - kGates) * kRowStep;
      bool valid = EXACT || (column + i % kGates * kRowStep < n && at < k);
      copy_async_ahead<FETCH>(stage + place(to, i), w_from + row * k, valid);
    }
  }

  __device__ __forceinline__ void copy_x(half* stage, int rows, int k) const {
    const int thread = Blocks::thread(), line = thread % kPieces / 8, chunk = thread % 8, row = thread / kPieces;
    const int target = (line * kTokens + row) * kLine + (chunk ^ (row & 7)) * 8;
#pragma unroll
    for (int i = 0; i < (kTokens + kRowStep - 1) / kRowStep; ++i) {
      int r = row + i * kRowStep;
      if (kTokens % kRowStep != 0 && r >= kTokens) break;
      copy_async(stage + kStageW + place(target, i), x_from + static_cast<long long>(i * kRowStep) * k,
                 r < rows && (EXACT || at < k));
    }
  }

  // To the next stage of the tile.
  __device__ __forceinline__ void advance() {
    constexpr int kStep = LINES * PARTS * kLine;
    w_from += kStep;
    x_from += kStep;
    at += kStep;
  }

  // From behind the end of a tile to the start of the next one, `tiles` on.
  __device__ __forceinline__ void next_tile(int tiles, int groups, int k) {
    const int back = groups * LINES * PARTS * kLine;
    w_from += static_cast<long long>(tiles) * kOut * k - back;
    x_from -= back;
    at -= back;
    column += tiles * kOut;
  }
};

// A warp's products of one stage.
__device__ __forceinline__ void multiply(float (&sum)[MT][NT][4], const half* stage, int rows_from, int chain, int lane) {
  int part = chain / CHAINS, first_step = chain % CHAINS * (4 / CHAINS);
#pragma unroll
  for (int j = 0; j < LINES; ++j) {
    int line = j * kParts + part;
    const half* a_row = stage + (line * kTile + rows_from + lane % 16) * kLine;
    const half* b_row = stage + kStageW + line * kTokens * kLine;
    uint32_t b_pair[4];
#pragma unroll
    for (int s = 0; s < 4 / CHAINS; ++s) {
      int step = first_step + s;
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; ++m) ldmatrix_x4(a[m], a_row + m * 16 * kLine + ((step * 2 + lane / 16) ^ (lane % 8)) * 8);
      if (NT == 1) {
        // One load serves two steps.
        if (s % 2 == 0) ldmatrix_x4(b_pair, b_row + (lane % 8) * kLine + ((step * 2 + lane / 8) ^ (lane % 8)) * 8);
        uint32_t b[2] = {b_pair[s % 2 * 2], b_pair[s % 2 * 2 + 1]};
#pragma unroll
        for (int m = 0; m < MT; ++m) mma_16816(sum[m][0], a[m], b);
      } else {
#pragma unroll
        for (int q = 0; q < NT / 2; ++q) {
          int token = q * 16 + lane / 16 * 8 + lane % 8;
          ldmatrix_x4(b_pair, b_row + token * kLine + ((step * 2 + lane / 8 % 2) ^ (lane % 8)) * 8);
          uint32_t low[2] = {b_pair[0], b_pair[1]}, high[2] = {b_pair[2], b_pair[3]};
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            mma_16816(sum[m][2 * q], a[m], low);
            mma_16816(sum[m][2 * q + 1], a[m], high);
          }
        }
      }
    }
  }
}

// Element e of a warp's tile (m, t) of sums: token 8 t + 2 (lane % 4) + e % 2, row 16 m + lane / 4 + 8 (e / 2).
__device__ __forceinline__ int sum_offset(int m, int t, int e, int lane) {
  return (8 * t + 2 * (lane % 4) + e % 2) * kPitch + 16 * m + lane / 4 + 8 * (e / 2);
}

// `total(token, column)` gives the sums of two columns of the tile; the block, or its cluster, writes `count` tokens.
template <typename Total>
__device__ __forceinline__ void write(void* y, int tile, int token0, int count, int n, int start, int stride,
                                      const Total& total) {
  for (int i = start; i < count * (kOut / 2); i += stride) {
    int token = i / (kOut / 2), column = i % (kOut / 2) * 2;
    int to = tile * kOut + column;
    if (to >= n) continue;
    float2 v = total(token, column);
    if (GLU) {
      float2 up = total(token, column + kTile / 2);
      v = make_float2(gated(v.x, up.x), gated(v.y, up.y));
    }
    store_pair(y, static_cast<long long>(token0 + token) * n + to, v.x, v.y);
  }
}

// x half [rows][k], w half [n][k] (GLU: [2 n][k]), y [rows][n] of float or half. n and k are multiples of 8.
// Grid: any number of blocks; SINGLE: as many as there are tiles (times PARTS with CLUSTER).
extern "C" __global__ void
#if CLUSTER
CLUSTER_DIMS(PARTS)
#endif
__launch_bounds__(kThreads, BLOCKS) skinny(const half* x, const half* w, void* y, int rows, int n, int k) {
  SHARED_MEMORY(half, shared);
  half* ring = Blocks::own(shared, SHARED);
  const int thread = Blocks::thread(), warp = thread / 32, lane = thread % 32;
  const int chain = warp % kChains, rows_from = warp / kChains * 16 * MT;
  const int part = Blocks::rank(), first_tile = Blocks::index();
  const int tiles = (n + kOut - 1) / kOut;
  const int groups = (k + kLine * LINES * PARTS - 1) / (kLine * LINES * PARTS);
  const int own = SINGLE ? 1 : (tiles - first_tile + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int steps = own * groups;
  Copier copier(x, w, first_tile, part, k);

  // The weights of the first stages, and a request for some more, do not need the kernel before.
  int group = 0;
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < steps) copier.copy_w(ring + s * kStage, n, k);
    copier.advance();
    if (++group == groups) group = 0, copier.next_tile(gridDim.x, groups, k);
  }
  for (int i = thread; i < AHEAD * kTile * kLines; i += kThreads) {
    int l = i % kLines, r = i / kLines % kTile, later = STAGES - 1 + i / (kLines * kTile);
    int column = first_tile * kOut + r % kOut;
    int at = (CLUSTER ? (later * LINES + l) * PARTS + part : later * kLines + l) * kLine;
    if (column < n && at < k) prefetch_l2(w + static_cast<long long>(r < kOut ? column : n + column) * k + at);
  }
  pdl_wait();
  {
    Copier first(x, w, first_tile, part, k);
    int x_group = 0;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
      if (s < steps) first.copy_x(ring + s * kStage, rows, k);
      first.advance();
      if (++x_group == groups) x_group = 0, first.next_tile(0, groups, k);
      copy_commit();
    }
  }

  float sum[MT][NT][4] = {};
  float* area = reinterpret_cast<float*>(SINGLE ? ring : ring + STAGES * kStage);
  int slot = 0, done = 0, current = first_tile;
  for (int step = 0; step < steps; ++step) {
    copy_wait<STAGES - 2>();
    __syncthreads();  // the stage is there for all, and all are done with the one before
    {
      half* stage = ring + (slot == 0 ? STAGES - 1 : slot - 1) * kStage;
      if (step + STAGES - 1 < steps) {
        copier.copy_w(stage, n, k);
        copier.copy_x(stage, rows, k);
        copier.advance();
        if (!SINGLE && ++group == groups) group = 0, copier.next_tile(gridDim.x, groups, k);
      } else {
        // Nothing is left to ask of memory: the next kernel may begin to. Earlier it would only take its share
        // from this one.
        pdl_launch();
      }
      copy_commit();
    }
    multiply(sum, ring + slot * kStage, rows_from, chain, lane);
    if (++slot == STAGES) slot = 0;
    if (++done < groups) continue;
    done = 0;

#if CLUSTER
    __syncthreads();  // all are done with the ring
    if (chain == CHAINS - 1) {
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) area[sum_offset(m, t, e, lane) + rows_from] = sum[m][t][e];
    }
    if (CHAINS > 1) __syncthreads();
    if (CHAINS > 1 && chain == 0) {
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float* at = area + sum_offset(m, t, e, lane) + rows_from;
            *at = sum[m][t][e] + *at;
          }
    }
    Blocks::sync();
    write(y, current, 0, rows, n, part * kThreads + thread, PARTS * kThreads, [&](int token, int column) {
      const float* at = area + token * kPitch + column;
      float2 v = Blocks::load(at, 0, SHARED);
#pragma unroll
      for (int p = 1; p < PARTS; ++p) v = add_pair(v, Blocks::load(at, p, SHARED));
      return v;
    });
    Blocks::sync();  // no block may go while others read its memory
#else
#pragma unroll
    for (int t0 = 0; t0 < NT; t0 += kPass / 8) {
      if (8 * t0 < rows) {
        if (SINGLE || t0 > 0) __syncthreads();  // all are done with the memory of the sums
        float* own_area = area + chain * kPass * kPitch + rows_from;
#pragma unroll
        for (int t = 0; t < kPass / 8; ++t)
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) own_area[sum_offset(m, t, e, lane)] = sum[m][t0 + t][e];
        __syncthreads();
        write(y, current, 8 * t0, min(rows - 8 * t0, kPass), n, thread, kThreads, [&](int token, int column) {
          const float* at = area + token * kPitch + column;
          float2 v = {};
#pragma unroll
          for (int p = 0; p < PARTS; ++p) {
            float2 part_sum = *reinterpret_cast<const float2*>(at + CHAINS * p * kPass * kPitch);
            if (CHAINS > 1)
              part_sum = add_pair(part_sum, *reinterpret_cast<const float2*>(at + (2 * p + 1) * kPass * kPitch));
            v = p == 0 ? part_sum : add_pair(v, part_sum);
          }
          return v;
        });
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int t = 0; t < NT; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][t][e] = 0.0f;
    current += gridDim.x;
#endif
  }
}
