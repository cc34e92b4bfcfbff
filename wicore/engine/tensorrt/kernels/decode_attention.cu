// Attention of single rows over the paged pool: the memory-bound half of the work.
//
// A row's keys are cut at absolute multiples of a span, whose length follows from the row's position alone. A
// block of WARPS warps takes one span of one row and KV head, with the GROUP query heads that share it: warp w
// has keys 16 TILES w .. of every STEP. Each warp copies its K and then its V into its own two buffers in
// shared memory, one step (or span) ahead of the arithmetic, which runs on the tensor cores:
//     S [queries][keys] = Q K^T, queries padded to 16 rows;    O^T [dims][queries] += V^T P^T
// whose operands are the other's results without a shuffle. The online softmax is that of Milakov and
// Gimelshein, 2018 (arXiv:1805.02867); splitting over keys is flash-decoding's (Dao et al., 2023).
// `merge_spans` then adds the spans up. No sum depends on anything but the row's own positions and values: a
// result is the same to the bit whoever shares the launch and wherever the blocks lie.
//
// The launch before these must let its successor start only after its own pdl_wait(), as append_kv does: work
// lists, tables and K and V of earlier steps are read before this grid's.
//
// 8-bit V: P takes V's scales, divided by the largest so far so that halves do not lose small ones.
//
// Macros beyond attention.cuh's: WARPS, TILES (16-key tiles a warp a step), MIN_BLOCKS (a multiprocessor),
// SPAN (positions, a multiple of STEP), ROWS (list entries that share
// scratch), MAX_SPANS (a row; spans double until they suffice), MERGE_PARTS.
//
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=16 INT8=0 WARPS=4 TILES=2 MIN_BLOCKS=3 SPAN=256 ROWS=64 MAX_SPANS=64 MERGE_PARTS=1
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=16 INT8=1 WARPS=4 TILES=2 MIN_BLOCKS=3 SPAN=256 ROWS=64 MAX_SPANS=64 MERGE_PARTS=1
// variant: HEADS=8 KV_HEADS=4 HEAD_DIM=256 BLOCK_TOKENS=16 INT8=0 WARPS=4 TILES=1 MIN_BLOCKS=2 SPAN=128 ROWS=64 MAX_SPANS=256 MERGE_PARTS=2
// variant: HEADS=4 KV_HEADS=1 HEAD_DIM=256 BLOCK_TOKENS=32 INT8=1 WARPS=4 TILES=1 MIN_BLOCKS=2 SPAN=128 ROWS=64 MAX_SPANS=256 MERGE_PARTS=8
#include "attention.cuh"

constexpr int STEP = WARPS * TILES * 16;  // positions
constexpr int THREADS = WARPS * 32;
constexpr int WARP_KEYS = TILES * 16;

// A listed row, as `schedule` leaves it for the other kernels.
struct Entry {
  int row;          // -1: nothing to do
  int last;         // last visible position
  int mass;         // where its stretch of mass begins, in blocks; -1: none
  int mass_only;    // no output
  int spans[2];     // spans of global and window layers
  int slot[2];      // where they begin in the scratch of the group
};

// One span of one row.
struct Item {
  int row, last, first;   // positions first..last are visible
  int begin, steps;       // of the span
  int table;              // where logical block 0 is, or would be, in the kind's tables
  int streamed;
  int slot;
  int mass;               // as Entry's
  int mass_only;
  int settled;            // what is below this position was in the pool before this step
  int unused;
};

constexpr int MASS_ONLY = 1 << 30;

// Positions of a span, of the spans that hold first..last.
__device__ __forceinline__ int span_of(int first, int last) {
  int span = SPAN;
  while (last / span - first / span >= MAX_SPANS) span *= 2;
  return span;
}

// Sum of `value` over the threads before this one; `total` over all. Every thread of the block must call it.
__device__ __forceinline__ int sum_before(int value, int* scratch, int& total) {
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int distance = 1; distance < blockDim.x; distance *= 2) {
    int before = threadIdx.x >= distance ? scratch[threadIdx.x - distance] : 0;
    __syncthreads();
    scratch[threadIdx.x] += before;
    __syncthreads();
  }
  total = scratch[blockDim.x - 1];
  int result = scratch[threadIdx.x] - value;
  __syncthreads();
  return result;
}

// The first position among a row's sequence's rows; 0 where it is more than 64 rows away. For whole warps.
__device__ __forceinline__ int first_position(int row, const int* positions, const int* row_seq) {
  int sequence = row_seq[row];
  for (int base = row; base > row - 64; base -= 32) {
    int before = base - 1 - static_cast<int>(threadIdx.x) % 32;
    unsigned others = __ballot_sync(0xffffffffu, before < 0 || row_seq[before] != sequence);
    if (others) return positions[base - (__ffs(others) - 1)];
  }
  return 0;
}

// One block. List entry i is row indices[i] (null: i), plus MASS_ONLY where no output is wanted, or -1. Writes
// entries [rows], items [2 kinds][groups][ROWS * MAX_SPANS] and counts [2 kinds][groups], of a group's items.
//
// A row's visible positions end with its own or, inside an image, with the image's (`image_end`, may be null).
// Stretches of mass: the last row of each sequence first, then whichever others still fit in `mass_blocks`.
extern "C" __global__ void schedule(int rows, int groups, const int* indices, const int* positions,
                                    const int* row_seq, const int* image_end, const int* global_offset,
                                    const int* window_offset, const int* window_first, const int* streamed,
                                    int window, int mass_blocks, Entry* entries, Item* items, int* counts) {
  SHARED_MEMORY(int, shared);
  int* scratch = shared;                       // [blockDim.x]
  int* spans = shared + blockDim.x;            // [2][blockDim.x]
  pdl_wait();
  pdl_launch();
  int tid = threadIdx.x;

  int taken = 0;
  for (int pass = 0; pass < 2; pass++) {
    for (int base = 0; base < rows; base += blockDim.x) {
      int i = base + tid, blocks = 0, row = -1, last = -1, only = 0;
      bool wanted = false;
      if (i < rows) {
        int index = indices ? indices[i] : i;
        only = index >= 0 && (index & MASS_ONLY);
        row = index < 0 ? -1 : index & ~MASS_ONLY;
        if (row >= 0 && positions[row] < 0) row = -1;
      }
      if (row >= 0) {
        last = positions[row];
        if (image_end) last = max(last, image_end[row] - 1);
        // Is the next entry another sequence's?
        bool final = true;
        if (i + 1 < rows) {
          int next = indices ? indices[i + 1] : i + 1;
          next = next < 0 ? -1 : next & ~MASS_ONLY;
          final = next < 0 || positions[next] < 0 || row_seq[next] != row_seq[row];
        }
        wanted = final == (pass == 0);
        blocks = wanted ? last / BLOCK_TOKENS + 1 : 0;
      }
      int total, at = taken + sum_before(blocks, scratch, total);
      taken += total;
      if (i < rows && (wanted || (pass == 0 && row < 0))) {
        Entry& e = entries[i];
        e.row = row, e.last = last, e.mass_only = only;
        e.mass = wanted && at + blocks <= mass_blocks ? at : -1;
      }
    }
  }
  __syncthreads();

  // Spans: prefix sums within each group, and the items, a warp an entry.
  for (int base = 0; base < rows; base += blockDim.x) {
    int i = base + tid;
    if (i < rows) {
      const Entry& e = entries[i];
      spans[tid] = spans[blockDim.x + tid] = 0;
      if (e.row >= 0) {
        spans[tid] = e.last / span_of(0, e.last) + 1;
        int seen = max(0, positions[e.row] - window + 1), span = span_of(seen, e.last);
        if (!e.mass_only) spans[blockDim.x + tid] = e.last / span - seen / span + 1;
      }
    }
    __syncthreads();
    if (i < rows) {
      int start = tid / ROWS * ROWS, end = min(start + ROWS, rows - base);
      for (int kind = 0; kind < 2; kind++) {
        const int* count = spans + kind * blockDim.x;
        int before = 0, total = 0;
        for (int j = start; j < end; j++) {
          before += j < tid ? count[j] : 0;
          total += count[j];
        }
        entries[i].spans[kind] = count[tid];
        entries[i].slot[kind] = before;
        if (tid == start) counts[kind * groups + i / ROWS] = total;
      }
    }
    __syncthreads();
  }
  for (int i = tid / 32; i < rows; i += blockDim.x / 32) {
    const Entry e = entries[i];
    if (e.row < 0) continue;
    int sequence = row_seq[e.row], settled = first_position(e.row, positions, row_seq);
    for (int kind = 0; kind < 2; kind++) {
      Item item = {};
      item.settled = settled;
      item.row = e.row, item.last = e.last, item.mass_only = e.mass_only;
      item.first = kind ? max(0, positions[e.row] - window + 1) : 0;
      item.table = kind ? window_offset[sequence] - window_first[sequence] : global_offset[sequence];
      item.streamed = kind ? 0 : streamed[sequence];
      item.mass = kind ? -1 : e.mass;
      int span = span_of(item.first, e.last);
      Item* to = items + (static_cast<long long>(kind) * groups + i / ROWS) * ROWS * MAX_SPANS + e.slot[kind];
      for (int j = tid % 32; j < e.spans[kind]; j += 32) {
        item.begin = (item.first / span + j) * span;
        item.steps = (min(e.last + 1 - item.begin, span) + STEP - 1) / STEP;
        item.slot = e.slot[kind] + j;
        to[j] = item;
      }
    }
  }
}

using Keys = Tile<CHUNKS>;
constexpr int BUFFER_BYTES = WARP_KEYS * Keys::STRIDE + (INT8 ? WARP_KEYS * 4 : 0);
constexpr int K16 = HEAD_DIM / 16;

// What one warp copies of a span's step, and whether a tile of it can be seen.
struct Step {
  Item item = {};
  int index = 0;  // of the step in the span
  int kv_head = 0;
  bool any = false;

  __device__ __forceinline__ int position() const {
    return item.begin + index * STEP + static_cast<int>(threadIdx.x) / 32 * WARP_KEYS;
  }
  __device__ __forceinline__ bool sees(int tile) const {
    int at = position() + tile * 16;
    return at <= item.last && at + 15 >= item.first;
  }
  // The step after this one, maybe of the block's next item.
  __device__ __forceinline__ void advance(int& work, int count, const Item* items) {
    if (any && ++index < item.steps) return;
    any = work < count;
    if (!any) return;
    const int4* from = reinterpret_cast<const int4*>(items + work / KV_HEADS);
    int4* to = reinterpret_cast<int4*>(&item);
    to[0] = from[0], to[1] = from[1], to[2] = from[2];
    kv_head = work % KV_HEADS;
    index = 0;
    work += gridDim.x;
  }
};

// Start copying K (or V, `value`) of this warp's keys of `step` to `buffer`; keys out of sight become 0.
__device__ __forceinline__ void fetch(const Step& step, Pool pool, bool value, char* buffer) {
  int lane = threadIdx.x % 32;
  if (step.any && !(value && step.item.mass_only)) {
    pool.table += step.item.table;
    pool.streamed = step.item.streamed;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (!step.sees(tile)) continue;
      int at = step.position() + tile * 16;
      const char* part = pool.block(at / BLOCK_TOKENS) + (value ? PART_BYTES : 0);
      const char* from = part + vector_at(step.kv_head, at);
#pragma unroll
      for (int i = 0; i < (16 * CHUNKS + 31) / 32; i++) {
        int chunk = i * 32 + lane, row = chunk / CHUNKS;
        if (16 * CHUNKS % 32 != 0 && row >= 16) break;
        bool visible = at + row <= step.item.last && at + row >= step.item.first;
        copy_async(buffer + Keys::at(tile * 16 + row, chunk % CHUNKS), from + chunk * 16, visible);
      }
#if INT8
      if (lane < 4)
        copy_async(buffer + WARP_KEYS * Keys::STRIDE + tile * 64 + lane * 16,
                   part + scale_at(step.kv_head, at) + lane * 16);
#endif
    }
  }
  copy_commit();
}

// Dims of the halves of Q's (and the pairs of bytes of K's) fragment registers, so that both agree.
__device__ __forceinline__ int dim_of(int k, int t, int high) {
  return k * 16 + (INT8 ? 4 * t + 2 * high : 2 * t + 8 * high);
}

#if INT8
// Where this lane's row is of the four matrices that hold the codes of pieces k and k + 1 (k even) of a tile.
__device__ __forceinline__ int two_pieces(int tile, int k) {
  int row = tile * 16 + threadIdx.x % 16, piece = threadIdx.x % 32 / 16;
  return K16 % 2 ? Keys::at(row, min(k + piece, CHUNKS - 1)) : Keys::pairs_on(Keys::at(row, piece), k / 2);
}
#endif

// One layer: for every item of the list and KV head the sums over its span,
//     acc [slots][HEADS][HEAD_DIM], of exp2(s - m) V;  ml [slots][HEADS], m and the sum of exp2(s - m)
// with s in units of log2. `tile_mass` (null: none) [KV_HEADS][mass_tiles][GROUP] gets the log2 of every 16-key
// tile's share of it. `device` and `host` begin at the layer's part of block 0.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    decode_attention(const half* q, const char* device, const char* host, long long block_bytes,
                     const int* tables, const Item* items, const int* items_count, float* acc, float2* ml,
                     float* tile_mass, long long mass_tiles) {
  SHARED_MEMORY(char, shared);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  char* keys = shared + warp * 2 * BUFFER_BYTES;
  char* values = keys + BUFFER_BYTES;
  float* sums = reinterpret_cast<float*>(shared + WARPS * 2 * BUFFER_BYTES);  // [WARPS][GROUP][HEAD_DIM]
  float* most = sums + WARPS * GROUP * HEAD_DIM;                                // [WARPS][8]
  float* total = most + WARPS * 8;                                              // [WARPS][8]

  Pool pool = {device, host, block_bytes, tables, 0};
  int work = blockIdx.x, count = *items_count * KV_HEADS;
  Step now, next;
  next.advance(work, count, items);
  bool settled = next.position() + WARP_KEYS <= next.item.settled;
  if (!settled) pdl_wait();
  fetch(next, pool, false, keys);
  fetch(next, pool, true, values);
  if (settled) pdl_wait();
  pdl_launch();

  uint32_t query[K16][2];
  float o[K16][4], m = 0.0f, l = 0.0f;
#if INT8
  float unit = 0.0f;  // the largest scale of V so far
#endif
  while (next.any) {
    now = next;
    next.advance(work, count, items);
    const Item& item = now.item;
    if (now.index == 0) {
      const half* from = q + (static_cast<long long>(item.row) * HEADS + now.kv_head * GROUP + g) * HEAD_DIM;
#pragma unroll
      for (int k = 0; k < K16; k++) {
        query[k][0] = query[k][1] = 0;
        if (g < GROUP) {
          query[k][0] = *reinterpret_cast<const uint32_t*>(from + dim_of(k, t, 0));
          query[k][1] = *reinterpret_cast<const uint32_t*>(from + dim_of(k, t, 1));
        }
        o[k][0] = o[k][1] = o[k][2] = o[k][3] = 0.0f;
      }
      m = -INFINITY, l = 0.0f;
#if INT8
      unit = 0.0f;
#endif
    }

    // Scores of query g: s[tile][half of the tile][2] at keys 8 half + 2t, + 1.
    float s[TILES][2][4] = {};
    copy_wait<1>();
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      if (!now.sees(tile)) continue;
#if INT8
#pragma unroll
      for (int k = 0; k < K16; k += 2) {
        uint32_t codes[4];
        ldmatrix_x4(codes, keys + two_pieces(tile, k));
#pragma unroll
        for (int j = 0; j < 2 && k + j < K16; j++) {
          uint32_t a[4] = {query[k + j][0], 0, query[k + j][1], 0};
#pragma unroll
          for (int n = 0; n < 2; n++) {
            uint32_t b[2] = {bytes_to_half2<0, 1>(codes[2 * j + n]), bytes_to_half2<2, 3>(codes[2 * j + n])};
            mma_16816(s[tile][n], a, b);
          }
        }
      }
      const float* scales = reinterpret_cast<const float*>(keys + WARP_KEYS * Keys::STRIDE) + tile * 16 + 2 * t;
#pragma unroll
      for (int n = 0; n < 2; n++) s[tile][n][0] *= scales[8 * n], s[tile][n][1] *= scales[8 * n + 1];
#else
#pragma unroll
      for (int k = 0; k < K16; k++) {
        uint32_t b[4], a[4] = {query[k][0], 0, query[k][1], 0};
        ldmatrix_x4(b, keys + Keys::pairs_on(Keys::at(tile * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2), k));
        mma_16816(s[tile][0], a, {b[0], b[1]});
        mma_16816(s[tile][1], a, {b[2], b[3]});
      }
#endif
    }
    __syncwarp();
    fetch(next, pool, false, keys);

    // Softmax so far. A key out of sight has p = 0 exactly; m stays -inf while nothing was seen.
    int at = now.position() + 2 * t;
    float high = m;
#pragma unroll
    for (int i = 0; i < TILES * 4; i++) {
      int position = at + i / 4 * 16 + i / 2 % 2 * 8 + i % 2;
      float& x = s[i / 4][i / 2 % 2][i % 2];
      x = position <= item.last && position >= item.first ? x * LOG2E : -INFINITY;
      high = fmaxf(high, x);
    }
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
    float base = high == -INFINITY ? 0.0f : high;
    float shrink = exp2_approx(m - base);
    m = high;
    l *= shrink;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float& x = s[tile][i / 2][i % 2];
        x = exp2_approx(x - base);
        sum += x;
      }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      l += sum;
      if (tile_mass && item.mass >= 0 && now.sees(tile) && t == 0 && g < GROUP) {
        long long index = static_cast<long long>(item.mass) * (BLOCK_TOKENS / 16) + now.position() / 16 + tile;
        tile_mass[(now.kv_head * mass_tiles + index) * GROUP + g] = log2f(sum) + base;
      }
    }

    copy_wait<1>();
    __syncwarp();
    if (!item.mass_only) {
#if INT8
      const float* scales = reinterpret_cast<const float*>(values + WARP_KEYS * Keys::STRIDE) + 2 * t;
      float largest = unit;
#pragma unroll
      for (int i = 0; i < TILES * 4; i++) {
        int key = i / 4 * 16 + i / 2 % 2 * 8 + i % 2;
        bool seen = at + key <= item.last && at + key >= item.first;
        largest = fmaxf(largest, seen ? scales[key] : 0.0f);
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
      shrink *= unit * inverse;
      unit = largest;
#pragma unroll
      for (int i = 0; i < TILES * 4; i++) {
        int key = i / 4 * 16 + i / 2 % 2 * 8 + i % 2;
        bool seen = at + key <= item.last && at + key >= item.first;
        s[i / 4][i / 2 % 2][i % 2] *= seen ? scales[key] * inverse : 0.0f;
      }
#endif
      // O's columns are queries 2t and 2t + 1.
      float left = __shfl_sync(0xffffffffu, shrink, 8 * t), right = __shfl_sync(0xffffffffu, shrink, 8 * t + 4);
#pragma unroll
      for (int k = 0; k < K16; k++) o[k][0] *= left, o[k][1] *= right, o[k][2] *= left, o[k][3] *= right;
#pragma unroll
      for (int tile = 0; tile < TILES; tile++) {
        if (!now.sees(tile)) continue;
        uint32_t p[2] = {pack_half2(s[tile][0][0], s[tile][0][1]), pack_half2(s[tile][1][0], s[tile][1][1])};
#if INT8
#pragma unroll
        for (int k = 0; k < K16; k += 2) {
          uint32_t codes[4];
          ldmatrix_x4_trans(codes, values + two_pieces(tile, k));
#pragma unroll
          for (int j = 0; j < 2 && k + j < K16; j++) {
            uint32_t low = codes[2 * j], top = codes[2 * j + 1];
            uint32_t a[4] = {bytes_to_half2<0, 2>(low), bytes_to_half2<1, 3>(low), bytes_to_half2<0, 2>(top),
                             bytes_to_half2<1, 3>(top)};
            mma_16816(o[k + j], a, p);
          }
        }
#else
#pragma unroll
        for (int k = 0; k < K16; k++) {
          uint32_t a[4];
          ldmatrix_x4_trans(
              a, values + Keys::pairs_on(Keys::at(tile * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2), k));
          mma_16816(o[k], a, p);
        }
#endif
      }
    }
    __syncwarp();
    fetch(next, pool, true, values);
    if (now.index + 1 < item.steps) continue;

    // The warps' sums become the span's.
    if (2 * t < GROUP) {
#pragma unroll
      for (int k = 0; k < K16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int dim = k * 16 + (INT8 ? 2 * g + i / 2 : g + 8 * (i / 2));
          if (2 * t + i % 2 < GROUP) sums[(warp * GROUP + 2 * t + i % 2) * HEAD_DIM + dim] = o[k][i];
        }
      }
    }
    if (t == 0) {
      most[warp * 8 + g] = m, total[warp * 8 + g] = l;
#if INT8
      // V's unit is alike for all queries, and 0 only where all that was summed is 0.
      if (g == 0) total[WARPS * 8 + warp] = unit;
#endif
    }
    __syncthreads();
    long long to = static_cast<long long>(item.slot) * HEADS + now.kv_head * GROUP;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
      int head = i / HEAD_DIM;
      float top = most[head];
#pragma unroll
      for (int w = 1; w < WARPS; w++) top = fmaxf(top, most[w * 8 + head]);
      float sum = 0.0f, weight = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float scale = exp2_approx(most[w * 8 + head] - top);
        weight = fmaf(scale, total[w * 8 + head], weight);
#if INT8
        scale *= total[WARPS * 8 + w];
#endif
        sum = fmaf(scale, sums[w * GROUP * HEAD_DIM + i], sum);
      }
      if (!item.mass_only) acc[to * HEAD_DIM + i] = sum;
      if (i % HEAD_DIM == 0) ml[to + head] = make_float2(top, weight);
    }
    __syncthreads();
  }
}

__device__ __forceinline__ void add(float4& sum, float weight, const float4& x) {
  sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
}

// A row's spans -> out half [rows][HEADS][HEAD_DIM], and its tiles -> shares of attention, added to (`first`:
// written as) mass [KV_HEADS][mass_blocks], summed over the group's heads. Block: (part, KV head, entry); a
// part has its share of the columns and of the blocks of mass. THREADS threads.
extern "C" __global__ void __launch_bounds__(128)
    merge_spans(const Entry* entries, int kind, const float* acc, const float2* ml, const float* tile_mass,
                long long mass_tiles, half* out, float* mass, long long mass_blocks, int first) {
  constexpr int COLUMNS = GROUP * HEAD_DIM / 4 / MERGE_PARTS;  // of four floats
  constexpr int WIDTH = COLUMNS < 128 ? COLUMNS : 128;          // of them at a time
  constexpr int RUNS = 128 / WIDTH;                             // threads a column
  SHARED_MEMORY(float, weights);                                // [GROUP][MAX_SPANS]
  float* norm = weights + GROUP * MAX_SPANS;                    // [GROUP], log2 of the row's sum
  float4* partial = reinterpret_cast<float4*>(norm + 8);        // [128]
  pdl_launch();  // what comes next may fetch weights meanwhile
  int part = blockIdx.x % MERGE_PARTS, kv_head = blockIdx.x / MERGE_PARTS % KV_HEADS;
  const Entry e = entries[blockIdx.x / MERGE_PARTS / KV_HEADS];
  pdl_wait();
  int spans = e.spans[kind], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e.row < 0 || spans == 0) return;
  long long from = static_cast<long long>(e.slot[kind]) * HEADS + kv_head * GROUP;

  // A thread sums a column over every RUNS-th span. The first few are asked for before their weights are known.
  constexpr int AHEAD = 4, STRIDE = HEADS * HEAD_DIM / 4;
  int column = threadIdx.x % WIDTH, run = threadIdx.x / WIDTH;
  bool active = run < RUNS && !e.mass_only;
  const float4* x = reinterpret_cast<const float4*>(acc + from * HEAD_DIM) + part * COLUMNS + column;
  float4 ahead[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    ahead[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (active && run + i * RUNS < spans) ahead[i] = x[static_cast<long long>(run + i * RUNS) * STRIDE];
  }

  for (int head = warp; head < GROUP; head += 4) {
    float most = -INFINITY, sum = 0.0f;
    const float2* of_span = ml + from + head;
    for (int i = lane; i < spans; i += 32) most = fmaxf(most, of_span[i * HEADS].x);
    most = warp_max(most);
    for (int i = lane; i < spans; i += 32) {
      float2 v = of_span[i * HEADS];
      float weight = exp2_approx(v.x - most);
      weights[head * MAX_SPANS + i] = weight;
      sum = fmaf(weight, v.y, sum);
    }
    sum = warp_sum(sum);
    __syncwarp();
    for (int i = lane; i < spans; i += 32) weights[head * MAX_SPANS + i] /= sum;
    if (lane == 0) norm[head] = most + log2f(sum);
  }
  __syncthreads();

  for (int base = 0; base < COLUMNS; base += WIDTH) {
    int at = (part * COLUMNS + base + column) * 4;
    const float* weight = weights + at / HEAD_DIM * MAX_SPANS;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (active && base + column < COLUMNS) {
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (base == 0 && run + i * RUNS < spans) add(sum, weight[run + i * RUNS], ahead[i]);
#pragma unroll 8
      for (int i = run + (base == 0 ? AHEAD * RUNS : 0); i < spans; i += RUNS)
        add(sum, weight[i], x[base + static_cast<long long>(i) * STRIDE]);
    }
    partial[threadIdx.x] = sum;
    __syncthreads();
    if (run == 0 && active && base + column < COLUMNS) {
      for (int i = 1; i < RUNS; i++) add(sum, 1.0f, partial[i * WIDTH + column]);
      half* to = out + (static_cast<long long>(e.row) * HEADS + kv_head * GROUP) * HEAD_DIM + at;
      *reinterpret_cast<uint2*>(to) = make_uint2(pack_half2(sum.x, sum.y), pack_half2(sum.z, sum.w));
    }
    __syncthreads();
  }

  if (!tile_mass || e.mass < 0 || kind != 0) return;
  constexpr int TILES_A_BLOCK = BLOCK_TOKENS / 16;
  for (int block = part * 128 + threadIdx.x; block <= e.last / BLOCK_TOKENS; block += MERGE_PARTS * 128) {
    float sum = 0.0f;
    long long tile = (kv_head * mass_tiles + static_cast<long long>(e.mass + block) * TILES_A_BLOCK) * GROUP;
#pragma unroll
    for (int i = 0; i < TILES_A_BLOCK; i++) {
      if (block * TILES_A_BLOCK + i > e.last / 16) break;
#pragma unroll
      for (int head = 0; head < GROUP; head++)
        sum += exp2_approx(tile_mass[tile + i * GROUP + head] - norm[head]);
    }
    float* to = mass + kv_head * mass_blocks + e.mass + block;
    *to = first ? sum : *to + sum;
  }
}

// mass [KV_HEADS][mass_blocks], summed over layers, is added to `out`, float32 by entry of the global tables:
// the mean over heads and layers of each listed row, summed over the rows of a sequence, which follow each
// other in the list. Grid: (parts, entries).
extern "C" __global__ void mass_of_sequences(int rows, const Entry* entries, const int* row_seq,
                                             const int* global_offset, const float* mass, long long mass_blocks,
                                             int layers, float* out) {
  pdl_wait();
  pdl_launch();
  int start = blockIdx.y;
  if (entries[start].row < 0) return;
  int sequence = row_seq[entries[start].row];
  if (start > 0 && entries[start - 1].row >= 0 && row_seq[entries[start - 1].row] == sequence) return;
  int end = start, blocks = 0;
  for (; end < rows && entries[end].row >= 0 && row_seq[entries[end].row] == sequence; end++)
    if (entries[end].mass >= 0) blocks = max(blocks, entries[end].last / BLOCK_TOKENS + 1);
  float scale = 1.0f / (static_cast<float>(HEADS) * layers);
  for (int j = blockIdx.x * blockDim.x + threadIdx.x; j < blocks; j += gridDim.x * blockDim.x) {
    float sum = 0.0f;
    for (int i = start; i < end; i++) {
      if (entries[i].mass < 0 || j > entries[i].last / BLOCK_TOKENS) continue;
      for (int head = 0; head < KV_HEADS; head++) sum += mass[head * mass_blocks + entries[i].mass + j];
    }
    out[global_offset[sequence] + j] += sum * scale;
  }
}
