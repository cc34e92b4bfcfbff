// Attention of prompt chunks over the paged pool: the compute-bound half of the work.
//
// FlashAttention-2 (Dao, 2023, arXiv:2307.08691) on mma.sync. A block takes 64 positions of one sequence and
// PACK query heads of one KV head: rows [PACK][64] of Q, warp w has 16 M_TILES of them. Tiles of TILE_KEYS
// keys, at absolute multiples of that, are copied in the background one ahead of the arithmetic. 8-bit tiles
// become halves in shared memory, once for all warps.
//
// A row's sums run over tiles in order of position. A tile that a row cannot see changes nothing in them, to
// the bit, so a result does not depend on how a prompt is cut.
//
// Macros beyond attention.cuh's: PACK, M_TILES, TILE_KEYS (a multiple of 16), MIN_BLOCKS (a multiprocessor).
//
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=16 INT8=0 PACK=2 M_TILES=2 TILE_KEYS=64 MIN_BLOCKS=2
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=16 INT8=1 PACK=2 M_TILES=2 TILE_KEYS=32 MIN_BLOCKS=2
// variant: HEADS=8 KV_HEADS=4 HEAD_DIM=256 BLOCK_TOKENS=16 INT8=0 PACK=2 M_TILES=1 TILE_KEYS=64 MIN_BLOCKS=1
// variant: HEADS=4 KV_HEADS=1 HEAD_DIM=256 BLOCK_TOKENS=32 INT8=1 PACK=1 M_TILES=1 TILE_KEYS=32 MIN_BLOCKS=2
#include "attention.cuh"

constexpr int POSITIONS = 64;
constexpr int ROWS = POSITIONS * PACK;
constexpr int WARPS = ROWS / (16 * M_TILES);
constexpr int THREADS = WARPS * 32;
constexpr int K16 = HEAD_DIM / 16;
constexpr int HALF_CHUNKS = HEAD_DIM / 8;
static_assert(POSITIONS % (16 * M_TILES) == 0, "a warp's rows are of one head");

using Halves = Tile<HALF_CHUNKS>;
using Codes = Tile<CHUNKS>;
constexpr int TILE_BYTES = TILE_KEYS * Halves::STRIDE;
constexpr int CODES_TILE_BYTES = TILE_KEYS * (Codes::STRIDE + 4);  // with scales
constexpr int STAGE_BYTES = 2 * (INT8 ? CODES_TILE_BYTES : TILE_BYTES);

// What a block works on, in shared memory: it would take too many registers for the length of the loop.
struct Work {
  Pool pool;
  int row, rows, start, head;  // the first of the tile's rows, its position, and the first of its heads
  int first, last;             // positions that any row sees
  int warp_last[WARPS];        // the last that any of a warp's rows sees
};

// Start copying K and V of positions start .. start + TILE_KEYS - 1; those out of sight become 0.
__device__ __forceinline__ void fetch(const Work& work, int start, char* stage) {
  constexpr int BYTES = STAGE_BYTES / 2;
  const Pool pool = work.pool;
  int kv_head = work.head / GROUP, first = work.first, last = work.last, thread = fresh(threadIdx.x);
#pragma unroll
  for (int group = 0; group < TILE_KEYS; group += 16) {  // 16 positions are in one block, one behind the other
    int at = start + group;
    const char* part = pool.block(max(first, min(at, last)) / BLOCK_TOKENS);
    const char* from = part + vector_at(kv_head, at) + thread * 16;
#pragma unroll
    for (int i = 0; i < (16 * CHUNKS + THREADS - 1) / THREADS; i++) {
      int chunk = i * THREADS + thread, row = chunk / CHUNKS;
      if (16 * CHUNKS % THREADS != 0 && row >= 16) break;
      bool valid = at + row >= first && at + row <= last;
      char* to = stage + Codes::at(group + row, chunk % CHUNKS);
      copy_async(to, from + i * THREADS * 16, valid);
      copy_async(to + BYTES, from + i * THREADS * 16 + PART_BYTES, valid);
    }
#if INT8
    if (thread < 4) {
      int row = thread * 4;
      bool valid = at + row + 3 >= first && at + row <= last;
      char* to = stage + TILE_KEYS * Codes::STRIDE + (group + row) * 4;
      const char* scales = part + scale_at(kv_head, at + row);
      copy_async(to, scales, valid);
      copy_async(to + BYTES, scales + PART_BYTES, valid);
    }
#endif
  }
}

// Codes and scales -> halves. Scales of vectors out of sight may be anything, so these are 0 again.
__device__ __forceinline__ void decode_tile(const char* from, char* to, int start, int first, int last) {
  const float* scales = reinterpret_cast<const float*>(from + TILE_KEYS * Codes::STRIDE);
#pragma unroll 4
  for (int chunk = threadIdx.x; chunk < TILE_KEYS * CHUNKS; chunk += THREADS) {
    int row = chunk / CHUNKS, piece = chunk % CHUNKS;
    uint4 codes = *reinterpret_cast<const uint4*>(from + Codes::at(row, piece));
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&codes);
    bool valid = start + row >= first && start + row <= last;
    float scale = valid ? scales[row] : 0.0f;
    uint32_t out[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      uint32_t pair = i % 2 ? bytes_to_half2<2, 3>(words[i / 2]) : bytes_to_half2<0, 1>(words[i / 2]);
      float2 x = __half22float2(*reinterpret_cast<half2*>(&pair));
      out[i] = pack_half2(x.x * scale, x.y * scale);
    }
    *reinterpret_cast<uint4*>(to + Halves::at(row, 2 * piece)) = make_uint4(out[0], out[1], out[2], out[3]);
    *reinterpret_cast<uint4*>(to + Halves::at(row, 2 * piece + 1)) = make_uint4(out[4], out[5], out[6], out[7]);
  }
}

// tiles: (first row, rows <= 64, sequence, position of the first row), heaviest first; rows <= 0: nothing.
// q, out: half [rows][HEADS][HEAD_DIM]. `device` and `host` begin at the layer's part of block 0; `first_block`
// and `streamed` may be null (0). window: positions a row sees, counted from its own; image_end (may be null):
// by row, where the image that it is part of ends, else 0. Grid: tiles * HEADS / PACK.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    prefill_attention(const int4* tiles, const half* q, half* out, const char* device, const char* host,
                      long long block_bytes, const int* tables, const int* offset, const int* first_block,
                      const int* streamed, int window, const int* image_end) {
  SHARED_MEMORY(char, shared);
  char* queries = shared;                                      // [ROWS], later the output
  char* stages = queries + ROWS * Halves::STRIDE;              // 2 of K and V
  char* decoded = stages + 2 * STAGE_BYTES;                    // K and V as halves, if the stages are codes
  int* ends = reinterpret_cast<int*>(decoded + (INT8 ? 2 * TILE_BYTES : 0));  // [64], last visible positions
  Work& work = *reinterpret_cast<Work*>(ends + POSITIONS);
  pdl_wait();
  pdl_launch();

  const int4 tile = tiles[blockIdx.x / (HEADS / PACK)];  // row, rows, sequence, position
  if (tile.y <= 0) return;
  int head = blockIdx.x % (HEADS / PACK) * PACK;
  for (int i = threadIdx.x; i < POSITIONS; i += THREADS) {
    int end = tile.w + min(i, tile.y - 1);
    if (image_end && i < tile.y) end = max(end, image_end[tile.x + i] - 1);
    ends[i] = end;
  }
  for (int chunk = threadIdx.x; chunk < ROWS * HALF_CHUNKS; chunk += THREADS) {
    int row = chunk / HALF_CHUNKS, piece = chunk % HALF_CHUNKS, i = row % POSITIONS;
    long long from = static_cast<long long>(tile.x + min(i, tile.y - 1)) * HEADS + head + row / POSITIONS;
    copy_async(queries + Halves::at(row, piece), q + from * HEAD_DIM + piece * 8, i < tile.y);
  }
  __syncthreads();
  {
    int warp = threadIdx.x / 32, seen = -1;
    for (int i = threadIdx.x % 32; i < 16 * M_TILES; i += 32)
      seen = max(seen, ends[(warp * 16 * M_TILES + i) % POSITIONS]);
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) seen = max(seen, __shfl_xor_sync(0xffffffffu, seen, mask));
    work.warp_last[warp] = seen;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int* table = tables + offset[tile.z] - (first_block ? first_block[tile.z] : 0);
    work.pool = {device, host, block_bytes, table, streamed ? streamed[tile.z] : 0};
    work.row = tile.x, work.rows = tile.y, work.start = tile.w, work.head = head;
    work.first = max(0, tile.w - window + 1), work.last = -1;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) work.last = max(work.last, work.warp_last[warp]);
  }
  __syncthreads();
  int at = work.first / TILE_KEYS;
  const int end = work.last / TILE_KEYS;
  fetch(work, at * TILE_KEYS, stages + at % 2 * STAGE_BYTES);
  copy_commit();

  float o[M_TILES][2 * K16][4] = {}, m[M_TILES][2], l[M_TILES][2];
#pragma unroll
  for (int i = 0; i < M_TILES; i++) m[i][0] = m[i][1] = -INFINITY, l[i][0] = l[i][1] = 0.0f;

  for (; at <= end; at++) {
    char* keys = stages + at % 2 * STAGE_BYTES;
    char* values = keys + STAGE_BYTES / 2;
    int thread = fresh(threadIdx.x), lane = thread % 32, g = lane / 4, t = lane % 4;
    int warp = thread / 32, warp_row = warp * 16 * M_TILES;
    copy_wait<0>();
    __syncthreads();
    int start = at * TILE_KEYS;
    if (at < end) fetch(work, start + TILE_KEYS, stages + (at + 1) % 2 * STAGE_BYTES);
    copy_commit();
#if INT8
    decode_tile(keys, decoded, start, work.first, work.last);
    decode_tile(values, decoded + TILE_BYTES, start, work.first, work.last);
    keys = decoded, values = decoded + TILE_BYTES;
    __syncthreads();
#endif
    int warp_last = work.warp_last[warp], warp_start = work.start + warp_row % POSITIONS;
    // A warp that sees nothing of the tile has nothing to do; one that sees all of it needs no mask.
    if (start <= warp_last && start + TILE_KEYS > warp_start - window + 1) {
      float s[M_TILES][TILE_KEYS / 8][4] = {};
      int query_at = Halves::at(warp_row + lane % 16, lane / 16);
      int key_at = Halves::at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
      int value_at = Halves::at(lane % 16, lane / 16);
#pragma unroll
      for (int k = 0; k < K16; k++) {
        uint32_t a[M_TILES][4];
#pragma unroll
        for (int i = 0; i < M_TILES; i++)
          ldmatrix_x4(a[i], queries + Halves::pairs_on(query_at, k) + i * 16 * Halves::STRIDE);
#pragma unroll
        for (int n = 0; n < TILE_KEYS / 16; n++) {
          uint32_t b[4];
          ldmatrix_x4(b, keys + Halves::pairs_on(key_at, k) + n * 16 * Halves::STRIDE);
#pragma unroll
          for (int i = 0; i < M_TILES; i++) {
            mma_16816(s[i][2 * n], a[i], {b[0], b[1]});
            mma_16816(s[i][2 * n + 1], a[i], {b[2], b[3]});
          }
        }
      }
      bool masked = start + TILE_KEYS - 1 > warp_start || start <= warp_start + 16 * M_TILES - 1 - window;
#pragma unroll
      for (int i = 0; i < M_TILES; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          if (masked) {
            int row = warp_row % POSITIONS + i * 16 + r * 8 + g, to = ends[row];
            int from = warp_start - warp_row % POSITIONS + row - window + 1;
#pragma unroll
            for (int n = 0; n < TILE_KEYS / 4; n++) {
              int position = start + n / 2 * 8 + 2 * t + n % 2;
              if (position < from || position > to) s[i][n / 2][2 * r + n % 2] = -INFINITY;
            }
          }
          float most = m[i][r];
#pragma unroll
          for (int n = 0; n < TILE_KEYS / 4; n++) most = fmaxf(most, s[i][n / 2][2 * r + n % 2]);
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
          most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
          // Exactly 1 where the tile changes nothing.
          float base = most == -INFINITY ? 0.0f : most, sum = 0.0f;
          float shrink = exp2_approx((m[i][r] - base) * LOG2E);
          m[i][r] = most;
          base *= LOG2E;
#pragma unroll
          for (int n = 0; n < TILE_KEYS / 4; n++) {
            float& x = s[i][n / 2][2 * r + n % 2];
            x = exp2_approx(fmaf(x, LOG2E, -base));
            sum += x;
          }
          l[i][r] = fmaf(l[i][r], shrink, sum);  // this lane's keys only, until the end
          if (__any_sync(0xffffffffu, shrink != 1.0f)) {
#pragma unroll
            for (int k = 0; k < 2 * K16; k++) o[i][k][2 * r] *= shrink, o[i][k][2 * r + 1] *= shrink;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < TILE_KEYS / 16; n++) {
        uint32_t a[M_TILES][4];
#pragma unroll
        for (int i = 0; i < M_TILES; i++) {
          a[i][0] = pack_half2(s[i][2 * n][0], s[i][2 * n][1]);
          a[i][1] = pack_half2(s[i][2 * n][2], s[i][2 * n][3]);
          a[i][2] = pack_half2(s[i][2 * n + 1][0], s[i][2 * n + 1][1]);
          a[i][3] = pack_half2(s[i][2 * n + 1][2], s[i][2 * n + 1][3]);
        }
#pragma unroll
        for (int k = 0; k < K16; k++) {
          uint32_t b[4];
          ldmatrix_x4_trans(b, values + Halves::pairs_on(value_at, k) + n * 16 * Halves::STRIDE);
#pragma unroll
          for (int i = 0; i < M_TILES; i++) {
            mma_16816(o[i][2 * k], a[i], {b[0], b[1]});
            mma_16816(o[i][2 * k + 1], a[i], {b[2], b[3]});
          }
        }
      }
    }
  }

  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp_row = threadIdx.x / 32 * 16 * M_TILES;
  // Through shared memory, where each warp's queries were, to whole 16-byte stores.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M_TILES; i++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = l[i][r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
      int row = warp_row + i * 16 + r * 8 + g;
#pragma unroll
      for (int k = 0; k < 2 * K16; k++)
        *reinterpret_cast<uint32_t*>(queries + Halves::at(row, k) + 4 * t) =
            pack_half2(o[i][k][2 * r] * scale, o[i][k][2 * r + 1] * scale);
    }
  }
  __syncwarp();
  for (int chunk = lane; chunk < 16 * M_TILES * HALF_CHUNKS; chunk += 32) {
    int row = warp_row + chunk / HALF_CHUNKS, piece = chunk % HALF_CHUNKS, i = row % POSITIONS;
    if (i >= work.rows) continue;
    long long to_head = static_cast<long long>(work.row + i) * HEADS + work.head + row / POSITIONS;
    half* to = out + to_head * HEAD_DIM + piece * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(queries + Halves::at(row, piece));
  }
}
