// Attention of prompt chunks over the paged pool on Hopper's own products: what prefill_attention.cu does
// with mma.sync, for KV in half precision.
//
// After FlashAttention-3 (Shah et al., 2024, arXiv:2407.08608). Persistent blocks go through items: 64 positions
// of one sequence and two query heads of one KV head. A warpgroup has the 64 rows of one head, so both share
// each tile of K and V. Two warps of a third warpgroup feed K and Q, and V, through the copy engine, in
// boxes of one block of the pool; where both rings have room, they are already at the next item. The
// warpgroups take turns: while one multiplies, the other exponentiates; and a warpgroup's product with V runs
// beside its next one with K.
//
// A row's sums run over tiles of TILE_KEYS keys, at absolute multiples of that, in order of position. A tile
// that a row cannot see changes nothing in them, to the bit, so a result does not depend on how a prompt is cut.
//
// Macros beyond attention.cuh's, of which HEAD_DIM is 64, 128 or 256 and INT8 is 0:
//   TILE_KEYS   a multiple of 16, up to 256
//   K_STAGES    tiles of K in the ring, and V_STAGES of V
//   TURNS       1: the warpgroups take turns at multiplying
//   VALUES      of a head's HEAD_DIM, a multiple of 16: the rest is 0 in K or Q, and what becomes of it is not written
//
// requires: sm_90a
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=16 INT8=0 TILE_KEYS=128 K_STAGES=3 V_STAGES=3 TURNS=1 VALUES=128
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=32 INT8=0 TILE_KEYS=128 K_STAGES=2 V_STAGES=2 TURNS=0 VALUES=128
// variant: HEADS=8 KV_HEADS=4 HEAD_DIM=256 BLOCK_TOKENS=16 INT8=0 TILE_KEYS=64 K_STAGES=2 V_STAGES=2 TURNS=1 VALUES=256
// variant: HEADS=32 KV_HEADS=16 HEAD_DIM=128 BLOCK_TOKENS=128 INT8=0 TILE_KEYS=128 K_STAGES=2 V_STAGES=2 TURNS=1 VALUES=80
#define POSITIONS 64
#define CONSUMERS 2
#define CLUSTER 1
#define THREADS (128 + 128 * CONSUMERS)
#define PANELS (HEAD_DIM / 64)              // a row of K, V or Q is cut into rows of 64 values
#define Q_BYTES (POSITIONS * HEAD_DIM * 2)  // of one head
#define TILE_BYTES (TILE_KEYS * HEAD_DIM * 2)
#define SHARED_BYTES (1024 + CONSUMERS * Q_BYTES + (K_STAGES + V_STAGES) * TILE_BYTES)  // barriers first

#include "attention.cuh"
#include "hopper.cuh"

#define PRODUCER_REGISTERS 40
#define CONSUMER_REGISTERS 232

static_assert(VALUES % 16 == 0 && VALUES <= HEAD_DIM, "see above");
static_assert(!INT8 && HEAD_DIM % 64 == 0 && GROUP % CONSUMERS == 0 && TILE_KEYS % 16 == 0, "see above");

WGMMA_OF_TILES(TILE_KEYS)
WGMMA_OF_REGISTERS(VALUES)

__device__ constexpr int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

constexpr int BOX_KEYS = common_divisor(BLOCK_TOKENS, TILE_KEYS);  // positions of a tile that are in one block
constexpr int BOXES = TILE_KEYS / BOX_KEYS * PANELS;               // of a tile
constexpr int ITEMS = HEADS / CONSUMERS;                           // of a tile of the work list
constexpr int TURN_BARRIER = 9, OWN_BARRIER = TURN_BARRIER + CONSUMERS;

// Which of a ring's tiles is next, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
  int stage;
  uint32_t parity;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Item {
  int row, rows, sequence, start;  // the first of its rows, and that one's position
  int head;                        // the first of its query heads
  int first, last;                 // positions that any row sees

  // The same in every lane of the warp that asks.
  __device__ __forceinline__ static Item read(int index, const int4* tiles, int window, const int* image_end) {
    const int4 tile = tiles[index / ITEMS];
    Item item = {tile.x, tile.y, tile.z, tile.w, index % ITEMS * CONSUMERS};
    item.first = max(0, item.start - window + 1);
    item.last = item.start + item.rows - 1;
    if (image_end) {
      for (int i = threadIdx.x % 32; i < item.rows; i += 32) item.last = max(item.last, image_end[item.row + i] - 1);
      item.last = __reduce_max_sync(0xffffffffu, item.last);
    }
    return item;
  }
};

// The item of a block's turn: blocks go through the list, longest first, to and fro, and so come to the same
// amount of work. Beyond the list's end: done.
__device__ __forceinline__ int item_of_turn(int turn) {
  const int block = turn % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  return turn * gridDim.x + block;
}

// What the boxes of a tile of K (part 0) or V (part 1) lie in: `row`s are vectors of HEAD_DIM values.
struct PagedRows {
  const TensorMap& device;
  const TensorMap& host;
  int block_rows, layer_row;
  const int* table;  // entry of logical block 0
  int streamed, first, last, kv_head;

  // The box of a tile that the lane copies: those of a block are side by side.
  __device__ __forceinline__ int position(int start, int box) const { return start + box / PANELS * BOX_KEYS; }

  __device__ __forceinline__ int entry(int position) const {
    return position + BOX_KEYS > first && position <= last ? table[position / BLOCK_TOKENS] : -1;
  }

  // Boxes of which nothing is seen become zeros, as what lies before the pool does.
  __device__ __forceinline__ void copy(uint32_t tile, int box, int position, int entry, int part,
                                       uint32_t barrier) const {
    const int in_block = (part * KV_HEADS + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
    const int row = entry < 0 ? -BOX_KEYS : entry * block_rows + layer_row + in_block;
    const int panel = box % PANELS;
    const uint32_t target = tile + (panel * TILE_KEYS + box / PANELS * BOX_KEYS) * 128;
    if (position / BLOCK_TOKENS < streamed) {
      copy_box(target, host, panel * 64, row, barrier);
    } else {
      copy_box(target, device, panel * 64, row, barrier);
    }
  }
};

// Rows of a tile of V that no row of the item sees become zeros where the copy engine could not tell: a
// product with a weight of 0 must be 0, whatever was there. By a whole warpgroup; each does it for itself.
__device__ __forceinline__ void clear_unseen(uint32_t tile, int start, int first, int last, int consumer) {
  const int low = max(0, first - start), high = min(TILE_KEYS, last - start + 1);
  const int before = low % BOX_KEYS, after = (BOX_KEYS - high % BOX_KEYS) % BOX_KEYS;
  if (before + after == 0) return;
  for (int piece = threadIdx.x % 128; piece < (before + after) * PANELS * 8; piece += 128) {
    const int i = piece / (PANELS * 8), panel = piece / 8 % PANELS;
    const int row = i < before ? low - before + i : high + i - before;
    *static_cast<uint4*>(shared_pointer(tile + (panel * TILE_KEYS + row) * 128 + piece % 8 * 16)) =
        make_uint4(0, 0, 0, 0);
  }
  shared_fence();
  named_barrier_wait(OWN_BARRIER + consumer, 128);
}

// Scores of keys outside of low .. low + span become -infinity; `low` is counted from the thread's first key.
__device__ __forceinline__ void mask(float (&s)[TILE_KEYS / 2], int low, int span, int r) {
#pragma unroll
  for (int n = 0; n < TILE_KEYS / 4; ++n) {
    const int key = n / 2 * 8 + n % 2;
    float& x = s[n / 2 * 4 + 2 * r + n % 2];
    if (static_cast<uint32_t>(key - low) > static_cast<uint32_t>(span)) x = -INFINITY;
  }
}

// Scores of row r (of the thread's two) become weights; what earlier sums must be multiplied with: exactly 1
// where the tile changes nothing. m: the largest score so far; l: the sum of this lane's weights.
__device__ __forceinline__ float weigh(float (&s)[TILE_KEYS / 2], float& m, float& l, int r) {
  float most[2] = {m, -INFINITY}, sum[2] = {};
#pragma unroll
  for (int n = 0; n < TILE_KEYS / 4; ++n) most[n % 2] = fmaxf(most[n % 2], s[n / 2 * 4 + 2 * r + n % 2]);
  most[0] = fmaxf(most[0], most[1]);
  most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], 1));
  most[0] = fmaxf(most[0], __shfl_xor_sync(0xffffffffu, most[0], 2));
  float base = most[0] == -INFINITY ? 0.0f : most[0];
  const float shrink = exp2_approx((m - base) * LOG2E);
  m = most[0];
  base *= LOG2E;
#pragma unroll
  for (int n = 0; n < TILE_KEYS / 4; ++n) {
    float& x = s[n / 2 * 4 + 2 * r + n % 2];
    x = exp2_approx(fmaf(x, LOG2E, -base));
    sum[n % 2] += x;
  }
  l = fmaf(l, shrink, sum[0] + sum[1]);
  return shrink;
}

// The thread's two rows of one head of `out`, 16 bytes a lane; `rows` of the warpgroup's 64 are stored.
__device__ __forceinline__ void store(float (&o)[VALUES / 2], const float (&l)[2], half* out, int row, int rows) {
  constexpr int BLOCKS = VALUES / 8;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = l[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float scale = sum > 0.0f ? 1.0f / sum : 0.0f;
    half* to = out + static_cast<long long>(row + 8 * r) * (HEADS * HEAD_DIM) + 8 * t;
#pragma unroll
    for (int j = 0; j < BLOCKS; j += 4) {
      uint32_t v[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && j + i < BLOCKS; ++i)
        v[i] = pack_half2(o[4 * (j + i) + 2 * r] * scale, o[4 * (j + i) + 2 * r + 1] * scale);
      transpose_quad(v, t);
      if (row + 8 * r < rows && (BLOCKS % 4 == 0 || j + t < BLOCKS))
        *reinterpret_cast<uint4*>(to + 8 * j) = make_uint4(v[0], v[1], v[2], v[3]);
    }
  }
}

// tiles: (first row, rows <= 64, sequence, position of the first row), heaviest first. q_map: half [rows]
// [HEADS * HEAD_DIM] in boxes of POSITIONS x 64. device_map, host_map: the pools as vectors of HEAD_DIM values in
// boxes of BOX_KEYS x 64; a block has `block_rows`, of which the layer's begin at `layer_row`. `first_block` and
// `streamed` may be null (0). window: positions a row sees, counted from its own; image_end (may be null): by
// row, where the image that it is part of ends, else 0. items: tiles * HEADS / 2. Grid: at most one block a
// multiprocessor, and no more than items.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    hopper_attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap device_map,
                     const __grid_constant__ TensorMap host_map, const int4* tiles, int items, half* out,
                     int block_rows, int layer_row, const int* tables, const int* offset, const int* first_block,
                     const int* streamed, int window, const int* image_end) {
  SHARED_MEMORY(char, memory);
  const uint32_t shared = shared_begin(memory);
  const uint32_t q_full = shared, q_empty = q_full + 8;
  const uint32_t k_full = q_empty + 8, k_empty = k_full + 8 * K_STAGES;
  const uint32_t v_full = k_empty + 8 * K_STAGES, v_empty = v_full + 8 * V_STAGES;
  const uint32_t queries = shared + 1024, keys = queries + CONSUMERS * Q_BYTES;
  const uint32_t values = keys + K_STAGES * TILE_BYTES;
  const int thread = block_thread();

  if (thread == 0) {
    prefetch_map(q_map);
    prefetch_map(device_map);
    barrier_init(q_full, 1);
    barrier_init(q_empty, CONSUMERS);
#pragma unroll 1
    for (int s = 0; s < K_STAGES; ++s) {
      barrier_init(k_full + 8 * s, 1);
      barrier_init(k_empty + 8 * s, CONSUMERS);
    }
#pragma unroll 1
    for (int s = 0; s < V_STAGES; ++s) {
      barrier_init(v_full + 8 * s, 1);
      barrier_init(v_empty + 8 * s, CONSUMERS);
    }
    barrier_init_fence();
  }
  cluster_sync();
  pdl_wait();
  pdl_launch();

  if (thread < 128) {
    fewer_registers<PRODUCER_REGISTERS>();
    const int part = thread / 32, lane = thread % 32;  // 0: K and Q, 1: V
    if (part > 1) return;
    // The lane's boxes of a tile are lane, lane + 32 ...
    constexpr int TURNS_OF_LANES = (BOXES + 31) / 32;
    const uint32_t full = part ? v_full : k_full, empty = part ? v_empty : k_empty, ring = part ? values : keys;
    const int stages = part ? V_STAGES : K_STAGES;
    int stage = 0;
    uint32_t parity = 1, q_parity = 1;  // of the phases of `empty` and `q_empty` to wait for
    for (int turn = 0, index; (index = item_of_turn(turn)) < items; ++turn) {
      const Item item = Item::read(index, tiles, window, image_end);
      if (item.rows <= 0) continue;
      const PagedRows paged = {device_map,
                               host_map,
                               block_rows,
                               layer_row,
                               tables + offset[item.sequence] - (first_block ? first_block[item.sequence] : 0),
                               streamed ? streamed[item.sequence] : 0,
                               item.first,
                               item.last,
                               item.head / GROUP};
      const int begin = item.first / TILE_KEYS, end = item.last / TILE_KEYS;
      int entries[TURNS_OF_LANES];
      auto look_up = [&](int tile) {
#pragma unroll
        for (int i = 0; i < TURNS_OF_LANES; ++i) {
          const int box = lane + 32 * i;
          entries[i] = box < BOXES ? paged.entry(paged.position(tile * TILE_KEYS, box)) : -1;
        }
      };
      look_up(begin);
#pragma unroll 1
      for (int tile = begin; tile <= end; ++tile) {
        barrier_wait(empty + 8 * stage, parity);
        if (lane == 0) barrier_expect(full + 8 * stage, TILE_BYTES);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < TURNS_OF_LANES; ++i) {
          const int box = lane + 32 * i;
          if (box < BOXES)
            paged.copy(ring + stage * TILE_BYTES, box, paged.position(tile * TILE_KEYS, box), entries[i], part,
                       full + 8 * stage);
        }
        __syncwarp();
        if (tile < end) look_up(tile + 1);  // while the ring is full
        if (++stage == stages) {
          stage = 0;
          parity ^= 1;
        }
        if (part == 0 && tile == begin) {
          barrier_wait(q_empty, q_parity);
          q_parity ^= 1;
          if (lane == 0) barrier_expect(q_full, CONSUMERS * Q_BYTES);
          __syncwarp();
          if (lane < CONSUMERS * PANELS)
            copy_box(queries + lane * (POSITIONS * 128), q_map, item.head * HEAD_DIM + lane * 64, item.row, q_full);
          __syncwarp();
        }
      }
    }
  } else {
    more_registers<CONSUMER_REGISTERS>();
    const int consumer = thread / 128 - 1, own = thread % 128;
    const int own_row = own / 32 * 16 + own % 32 / 4, t = own % 4;  // and own_row + 8
    const uint64_t q_at = tile_descriptor(queries + consumer * Q_BYTES);
    Ring<K_STAGES> k = {0, 0};
    Ring<V_STAGES> v = {0, 0};
    uint32_t q_parity = 0;
    float s[TILE_KEYS / 2], o[VALUES / 2];
    uint32_t p[TILE_KEYS / 16][4];

    auto multiply_keys = [&]() {
      const uint64_t b = tile_descriptor(keys + k.stage * TILE_BYTES);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < VALUES / 16; ++i)
        wgmma(s, q_at + (i / 4 * (POSITIONS * 128) + i % 4 * 32) / 16,
              b + (i / 4 * (TILE_KEYS * 128) + i % 4 * 32) / 16, i);
      wgmma_commit();
    };
    auto multiply_values = [&]() {
      const uint64_t b = transposed_descriptor(values + v.stage * TILE_BYTES, TILE_KEYS * 128);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < TILE_KEYS / 16; ++i) wgmma(o, p[i], b + i * (2048 / 16));
      wgmma_commit();
    };
    auto release = [&](uint32_t barrier) {
      if (own == 0) barrier_arrive(barrier);
    };
    auto pack = [&]() {
#pragma unroll
      for (int i = 0; i < TILE_KEYS / 4; ++i) p[i / 4][i % 4] = pack_half2(s[2 * i], s[2 * i + 1]);
    };

#if TURNS
    if (consumer == 1) named_barrier_arrive(TURN_BARRIER, 256);
#endif
    for (int turn = 0, index; (index = item_of_turn(turn)) < items; ++turn) {
      const Item item = Item::read(index, tiles, window, image_end);
      if (item.rows <= 0) continue;
      const int begin = item.first / TILE_KEYS, end = item.last / TILE_KEYS;
      int from[2], span[2];  // the first position that a row sees, and how many more it does
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = own_row + 8 * r;
        from[r] = item.start + i - window + 1;
        int to = item.start + min(i, item.rows - 1);
        if (image_end && i < item.rows) to = max(to, image_end[item.row + i] - 1);
        span[r] = to - from[r];
      }
      float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f}, shrink[2];
      auto softmax = [&](int tile) {
        const int start = tile * TILE_KEYS;
        const bool masked =
            start + TILE_KEYS - 1 > item.start || start <= item.start + POSITIONS - 1 - window;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (masked) mask(s, from[r] - start - 2 * t, span[r], r);
          shrink[r] = weigh(s, m[r], l[r], r);
        }
      };

      barrier_wait(q_full, q_parity);
      q_parity ^= 1;
      barrier_wait(k_full + 8 * k.stage, k.parity);
      multiply_keys();
#pragma unroll
      for (int i = 0; i < VALUES / 2; ++i) o[i] = 0.0f;
      wgmma_wait<0>();
      wgmma_settled(s);
      release(k_empty + 8 * k.stage);
      k.advance();
      if (begin == end) release(q_empty);
      softmax(begin);
      pack();

#pragma unroll 1
      for (int tile = begin + 1; tile <= end; ++tile) {
        barrier_wait(k_full + 8 * k.stage, k.parity);
#if TURNS
        named_barrier_wait(TURN_BARRIER + consumer, 256);
#endif
        multiply_keys();
        barrier_wait(v_full + 8 * v.stage, v.parity);
        clear_unseen(values + v.stage * TILE_BYTES, (tile - 1) * TILE_KEYS, item.first, item.last, consumer);
        multiply_values();
#if TURNS
        named_barrier_arrive(TURN_BARRIER + 1 - consumer, 256);
#endif
        wgmma_wait<1>();
        wgmma_settled(s);
        release(k_empty + 8 * k.stage);
        k.advance();
        if (tile == end) release(q_empty);
        softmax(tile);
        wgmma_wait<0>();
        wgmma_settled(o);
        wgmma_settled(p);
        release(v_empty + 8 * v.stage);
        v.advance();
        if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
          for (int i = 0; i < VALUES / 2; ++i) o[i] *= shrink[i / 2 % 2];
        }
        pack();
      }

      barrier_wait(v_full + 8 * v.stage, v.parity);
      clear_unseen(values + v.stage * TILE_BYTES, end * TILE_KEYS, item.first, item.last, consumer);
      multiply_values();
      wgmma_wait<0>();
      wgmma_settled(o);
      release(v_empty + 8 * v.stage);
      v.advance();
      half* to = out + static_cast<long long>(item.row) * (HEADS * HEAD_DIM) + (item.head + consumer) * HEAD_DIM;
      store(o, l, to, own_row, item.rows);
    }
  }
}
