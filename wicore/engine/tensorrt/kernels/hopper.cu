// Y[rows][n] = X[rows][k] W[n][k]^T for many rows: half operands, float32 sums, on Hopper (sm_90a).
//
// Persistent blocks of one warpgroup that feeds a ring of tiles in shared memory through the copy engine, and
// CONSUMERS warpgroups that multiply: 64 rows by TILE_N columns each, sums in registers. Blocks of a cluster
// share tiles: CLUSTER_M blocks below each other the tile of W, CLUSTER_N blocks side by side the tile of X;
// each loads a part and the copy engine hands it to all. Every sum runs over k in ascending order whatever
// the tile, so a row's result depends neither on the number of rows nor on the choice of tile. After the
// structure of CUTLASS's warp-specialised kernels for sm_90.
//
//   TILE_N               columns of a tile: 8..256
//   CONSUMERS            1..3: a tile has 64 * CONSUMERS rows
//   CLUSTER_M, CLUSTER_N blocks of a cluster by rows and by columns
//   B_BOX                rows of W in one copy; GLU: an even number of copies. Blocks of a cluster take turns
//   STAGES               tiles in the ring
//   STAGGER              steps of k by which the second consumer is behind: one multiplies, another stores
//   GLU                  1: W is n gate rows, then n up rows; y = half(gelu(gate) up / 64), saturated. Else 0
//   HALF_OUT             1: y is half, the sum times `scale`, no further from 0 than `limit`; 0: float32
//   BIAS                 1, of half y: bias[n] is added to the sum first
//   GELU                 1, of half y: and then its gelu taken
//
// requires: sm_90a
// variant: TILE_N=256 CONSUMERS=2 CLUSTER_M=2 CLUSTER_N=1 B_BOX=128 STAGES=4 STAGGER=0 GLU=0 HALF_OUT=0 BIAS=0 GELU=0
// variant: TILE_N=256 CONSUMERS=2 CLUSTER_M=2 CLUSTER_N=1 B_BOX=128 STAGES=4 STAGGER=2 GLU=1 HALF_OUT=1 BIAS=0 GELU=0
// variant: TILE_N=192 CONSUMERS=3 CLUSTER_M=1 CLUSTER_N=1 B_BOX=192 STAGES=4 STAGGER=0 GLU=0 HALF_OUT=1 BIAS=0 GELU=0
// variant: TILE_N=112 CONSUMERS=1 CLUSTER_M=1 CLUSTER_N=4 B_BOX=56 STAGES=10 STAGGER=0 GLU=1 HALF_OUT=1 BIAS=0 GELU=0
// variant: TILE_N=64 CONSUMERS=2 CLUSTER_M=1 CLUSTER_N=4 B_BOX=64 STAGES=9 STAGGER=0 GLU=0 HALF_OUT=1 BIAS=0 GELU=0
// variant: TILE_N=192 CONSUMERS=2 CLUSTER_M=2 CLUSTER_N=1 B_BOX=96 STAGES=5 STAGGER=0 GLU=0 HALF_OUT=1 BIAS=1 GELU=1
#define TILE_M (64 * CONSUMERS)
#define TILE_K 64
#define CLUSTER (CLUSTER_M * CLUSTER_N)
#define THREADS (128 + 128 * CONSUMERS)
#define A_BYTES (TILE_M * TILE_K * 2)
#define B_BYTES (TILE_N * TILE_K * 2)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define SHARED_BYTES (1024 + STAGES * STAGE_BYTES)  // barriers, then the ring

#include "hopper.cuh"

WGMMA_OF_TILES(TILE_N)

#define A_BOX (TILE_M / CLUSTER_N)
#define B_BOXES (TILE_N / B_BOX)
#define OUT_N (GLU ? TILE_N / 2 : TILE_N)  // columns of y in a tile
#define BLOCKS (OUT_N / 8)
#define RELEASES (CLUSTER_M + CLUSTER_N - 1)  // blocks that write to a block's ring

#if CONSUMERS == 2
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS 240
#elif CONSUMERS == 3
#define PRODUCER_REGISTERS 32
#define CONSUMER_REGISTERS 160
#endif

static_assert(TILE_N % B_BOX == 0 && B_BOX % 8 == 0, "B_BOX must part TILE_N");
static_assert(!GLU || (B_BOXES % 2 == 0 && HALF_OUT), "a copy holds gate rows or up rows");
static_assert(!(BIAS || GELU) || (HALF_OUT && !GLU), "bias and gelu are of plain half output");
static_assert(A_BOX % 8 == 0, "copies keep to the period of the swizzle");
static_assert(STAGES > STAGGER, "the first consumer must get ahead before the second frees a stage");

// Tiles in an order in which those that run at the same time share rows and columns: `group` rows of clusters
// at a time, column by column.
struct Raster {
  int tiles_m, tiles_n, group;
  __device__ __forceinline__ int tiles() const { return tiles_m * tiles_n; }
  __device__ __forceinline__ void place(int tile, int& m, int& n) const {
    const int first = tile / (group * tiles_n) * group, rest = tile - first * tiles_n;
    const int height = min(group, tiles_m - first);
    n = rest / height;
    m = first + rest - n * height;
  }
};

// NaN stays.
__device__ __forceinline__ float clipped(float v, float limit) { return v > limit ? limit : v < -limit ? -limit : v; }

// gelu by tanh: x / (1 + exp(-2 z)) with z = sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu_tanh(float x) {
  float power = x * fmaf(x * x, -2.0f * 1.4426950408889634f * 0.7978845608028654f * 0.044715f,
                         -2.0f * 1.4426950408889634f * 0.7978845608028654f);
  return x * reciprocal_fast(1.0f + exp2_fast(power));
}

__device__ __forceinline__ float gated(float gate, float up) {
  return clipped(gelu_tanh(gate) * (up * 0.015625f), 65504.0f);
}

// What is made of half output's sums. `bias` begins at the tile's first column and this lane's share of eight.
struct Epilogue {
  float scale, limit;
  const float* bias;

  __device__ __forceinline__ float of(float sum, float added) const {
    if (BIAS) sum += added;
    if (GELU) sum = gelu_tanh(sum);
    return clipped(sum * scale, limit);
  }
};

// Two neighbouring values of y, as half: block j of 8 columns, row g (half 0) or g + 8 (half 1) of the warp.
__device__ __forceinline__ uint32_t out_pair(const float (&d)[TILE_N / 2], int j, int half_,
                                             const Epilogue& epilogue, bool inside) {
  int i = 4 * j + 2 * half_;
#if GLU
  return pack_half2(gated(d[i], d[i + TILE_N / 4]), gated(d[i + 1], d[i + 1 + TILE_N / 4]));
#else
  float2 added = make_float2(0.0f, 0.0f);
  if (BIAS && inside) added = *reinterpret_cast<const float2*>(epilogue.bias + 8 * j);
  return pack_half2(epilogue.of(d[i], added.x), epilogue.of(d[i + 1], added.y));
#endif
}

// The sums of a warp to rows `row` (and + 8) of y, 16 bytes a lane: lanes of a quad hold 64 contiguous bytes.
// n is a multiple of 8, so that a block of 8 columns is inside or outside as a whole.
__device__ __forceinline__ void store(const float (&d)[TILE_N / 2], void* y, int row, int column, int rows, int n,
                                      const Epilogue& epilogue) {
  const int t = threadIdx.x % 4;
#if HALF_OUT
  const int blocks = 4, first = column + 8 * t;  // of the columns that this lane stores of four blocks
  half* to = static_cast<half*>(y) + static_cast<size_t>(row) * n + first;
#else
  const int blocks = 2, first = column + 8 * (t & 1);
  float* to = static_cast<float*>(y) + static_cast<size_t>(row) * n + first + 4 * (t / 2);
  const int odd = t & 1;
#endif
  const int room = min(n - first, OUT_N - (first - column));
  decltype(to) const to_of[2] = {to, to + static_cast<size_t>(8) * n};
  const int room_of[2] = {row < rows ? room : 0, row + 8 < rows ? room : 0};
#pragma unroll
  for (int j = 0; j < BLOCKS; j += blocks)
#pragma unroll
    for (int half_ = 0; half_ < 2; ++half_) {
#if HALF_OUT
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = j + i < BLOCKS
                   ? out_pair(d, j + i < BLOCKS ? j + i : 0, half_, epilogue, column + 8 * (j + i) < n)
                   : 0u;
      transpose_quad(v, t);
      if (8 * j < room_of[half_])
        *reinterpret_cast<uint4*>(to_of[half_] + 8 * j) = make_uint4(v[0], v[1], v[2], v[3]);
#else
      const int a = 4 * j + 2 * half_, b = j + 1 < BLOCKS ? a + 4 : a;
      float v[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float got = __shfl_xor_sync(0xffffffffu, choose(odd, d[a + i], d[b + i]), 1);
        v[i] = choose(odd, got, d[a + i]);
        v[i + 2] = choose(odd, d[b + i], got);
      }
      if (8 * j < room_of[half_])
        *reinterpret_cast<float4*>(to_of[half_] + 8 * j) = make_float4(v[0], v[1], v[2], v[3]);
#endif
    }
}

// `group`: rows of clusters that are gone through together (see Raster); `scale`, `limit` and `bias` of plain half
// output. Grid: clusters times CLUSTER, at most one block a multiprocessor.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    hopper_matmul(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, void* y,
                  int rows, int n, int k, int group, float scale, float limit, const float* bias) {
  SHARED_MEMORY(char, memory);
  const uint32_t shared = shared_begin(memory);
  const uint32_t full = shared, empty = full + 8 * STAGES, started = empty + 8 * STAGES, ring = shared + 1024;
  const int thread = block_thread(), rank = cluster_rank();
  const int rank_m = rank % CLUSTER_M, rank_n = rank / CLUSTER_M;
  const int steps = (k + TILE_K - 1) / TILE_K;
  const Raster raster = {(rows + TILE_M * CLUSTER_M - 1) / (TILE_M * CLUSTER_M),
                         (n + OUT_N * CLUSTER_N - 1) / (OUT_N * CLUSTER_N), group};

  if (thread == 0) {
#pragma unroll 1
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, CONSUMERS * RELEASES);
    }
    barrier_init(started, 1);
    barrier_init_fence();
  }
  cluster_sync();

  if (thread < 128) {
#ifdef PRODUCER_REGISTERS
    fewer_registers<PRODUCER_REGISTERS>();
#endif
    if (thread == 0) {
      prefetch_map(x_map);
      prefetch_map(w_map);
      auto load_x = [&](int stage, int m, int step) {
        uint32_t target = ring + stage * STAGE_BYTES + rank_n * (A_BOX * TILE_K * 2);
        int row = (m * CLUSTER_M + rank_m) * TILE_M + rank_n * A_BOX;
#if CLUSTER_N > 1
        uint32_t blocks = 0;
        for (int i = 0; i < CLUSTER_N; ++i) blocks |= 1u << (rank_m + CLUSTER_M * i);
        copy_box_to(target, x_map, step * TILE_K, row, full + 8 * stage, blocks);
#else
        copy_box(target, x_map, step * TILE_K, row, full + 8 * stage);
#endif
      };
      auto load_w = [&](int stage, int tile_n, int step) {
        uint32_t target = ring + stage * STAGE_BYTES + A_BYTES;
        int column = (tile_n * CLUSTER_N + rank_n) * OUT_N;
#pragma unroll
        for (int i = 0; i < B_BOXES; ++i) {
          if ((i + step) % CLUSTER_M != rank_m) continue;
          const int up = GLU && i >= B_BOXES / 2;
          int row = column + (up ? n + (i - B_BOXES / 2) * B_BOX : i * B_BOX);
#if CLUSTER_M > 1
          copy_box_to(target + i * (B_BOX * TILE_K * 2), w_map, step * TILE_K, row, full + 8 * stage,
                      ((1u << CLUSTER_M) - 1) << (CLUSTER_M * rank_n));
#else
          copy_box(target + i * (B_BOX * TILE_K * 2), w_map, step * TILE_K, row, full + 8 * stage);
#endif
        }
      };
      auto begin = [&](int stage) { barrier_expect(full + 8 * stage, STAGE_BYTES); };

      // No kernel writes weights: the first of them may come while the kernel before still writes X.
      const int early = min(STAGES, steps);
      int m, column;
      raster.place(cluster_index(), m, column);
#pragma unroll 1
      for (int s = 0; s < early; ++s) {
        begin(s);
        load_w(s, column, s);
      }
      pdl_wait();
      pdl_launch();
#pragma unroll 1
      for (int s = 0; s < early; ++s) load_x(s, m, s);

      int stage = early % STAGES, first_step = early;
      uint32_t parity = early < STAGES ? 1 : 0;  // of the round of `empty` to wait for
      for (int tile = cluster_index(); tile < raster.tiles(); tile += cluster_count()) {
        raster.place(tile, m, column);
#pragma unroll 1
        for (int step = first_step; step < steps; ++step) {
          barrier_wait(empty + 8 * stage, parity);
          begin(stage);
          load_x(stage, m, step);
          load_w(stage, column, step);
          if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
          }
        }
        first_step = 0;
      }
    }
  } else {
#ifdef CONSUMER_REGISTERS
    more_registers<CONSUMER_REGISTERS>();
#endif
    const int consumer = thread / 128 - 1, own = thread % 128;
    const uint32_t first_a = ring + consumer * (64 * TILE_K * 2), first_b = ring + A_BYTES;
    // The stage may be overwritten by every block that loads for this one.
#if CLUSTER > 1
    int to = rank;
    if (own < CLUSTER_N) {
      to = rank_m + CLUSTER_M * own;
    } else if (own < RELEASES) {
      int other = own - CLUSTER_N;
      to = other + (other >= rank_m) + CLUSTER_M * rank_n;
    }
#endif
    auto release = [&](int stage) {
      if (own < RELEASES) {
#if CLUSTER > 1
        barrier_arrive_at(empty + 8 * stage, to);
#else
        barrier_arrive(empty + 8 * stage);
#endif
      }
    };
#if STAGGER
    if (consumer > 0) barrier_wait(started, 0);
    bool announce = consumer == 0;
#endif
    int stage = 0;
    uint32_t parity = 0;
    for (int tile = cluster_index(); tile < raster.tiles(); tile += cluster_count()) {
      int m, column;
      raster.place(tile, m, column);
      const int row = (m * CLUSTER_M + rank_m) * TILE_M + consumer * 64 + own / 32 * 16 + own % 32 / 4;
      column = (column * CLUSTER_N + rank_n) * OUT_N;
      float d[TILE_N / 2];
      int before = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        uint64_t a = tile_descriptor(first_a + stage * STAGE_BYTES);
        uint64_t b = tile_descriptor(first_b + stage * STAGE_BYTES);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; ++i) wgmma(d, a + 2 * i, b + 2 * i, step | i);
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          release(before);
        }
        before = stage;
        if (++stage == STAGES) {
          stage = 0;
          parity ^= 1;
        }
#if STAGGER
        if (announce && (step == STAGGER - 1 || step == steps - 1)) {
          if (own == 0) barrier_arrive(started);
          announce = false;
        }
#endif
      }
      wgmma_wait<0>();
      wgmma_settled(d);
      release(before);
      store(d, y, row, column, rows, n, {scale, limit, bias + column + own % 4 * 2});
    }
  }
  // No block may end while others still write to its shared memory.
  if (CLUSTER > 1) {
    __syncwarp();
    cluster_sync();
  }
}
