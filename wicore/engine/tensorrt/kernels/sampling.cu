// Drawing tokens: wicore/sampling.py on the GPU, one token a row of logits [rows][vocab], float32.
//
// Four kernels, none of which sorts the vocabulary:
//
//   sample_scan    reads the row once: applies bias and penalties, takes maxima of strips and chunks
//                  and sums of weights
//   sample_count   for rows with a filter: a histogram of tokens and weights by distance from the maximum
//   sample_gather  the histogram says in which bins top-k, top-p, min-p and the draw fall: lists their tokens
//   sample_select  orders the list, cuts and draws exactly; or takes the maximum; or inverts the CDF in id
//                  order; then finds the raw logprobs
//
// Weights are integers, exp((x - max) / temperature) * 2^40, so that no sum depends on an order. A row's
// token depends on the row alone: chunks are fixed, whatever the grid.
//
// variant: CHUNK=4096 STRIP=512 BINS=2048 CAPACITY=4096 TOP=20
#include "common.cuh"
#include "random.cuh"

typedef unsigned long long u64;

// sampler.py defines the sizes that it allocates by:
//   CHUNK     tokens of a block of sample_scan, 4096
//   STRIP     tokens of a warp, 512: 16 a lane
//   BINS      of the histogram
//   CAPACITY  of the list of a row; rows that need more are searched without a list
//   TOP       alternatives that can be asked for
#define SELECT_THREADS 1024

#define ONE (1ull << 40)          // weight of the likeliest token
#define WEIGHTLESS 27.8f          // distance in temperatures at which a weight is under 1
#define KEY_NO_TOKEN 0x007FFFFFu  // key_of(-inf)
#define KEY_INFINITE 0xFF800000u  // key_of(+inf); NaN is above it

#define GREEDY 0
#define WHOLE 1
#define FILTERED 2

// What a row asks for; sampler.py's _ROW.
struct SampledRow {
  long long seed, position;
  double top_p;
  const uint32_t* mask;  // bit i % 32 of word i / 32 allows token i; null: all are allowed
  int2* entries;         // bias_count of (id, bias), then seen_count of (id, times generated); floats as bits
  float* raw;            // scratch, a float an entry: the logit before it was touched
  int bias_count, seen_count;
  int source;  // row of the logits; -1: nothing to draw
  int mode;
  int top_k;   // 0: off
  int wanted;  // alternatives; -1: no logprobs
  float temperature, inverse_temperature;
  float min_p_distance;  // tokens further than this below the maximum fall to min-p; infinite: off
  float share_distance;  // temperature * log(vocab / (1 - top_p)); infinite: off
  float repetition, frequency, presence;
  float unused;
};

// sampler.py's _RESULT.
struct SampledResult {
  int id;        // -1: the row's maximum is no number; it is in `peak`
  int count;     // alternatives
  float peak;    // raw maximum
  float raw;     // raw logit of the token
  double total;  // sum of exp(raw - peak)
  int ids[TOP];
  float raws[TOP];
};

__device__ __forceinline__ int chunks_of(int vocab) { return (vocab + CHUNK - 1) / CHUNK; }
__device__ __forceinline__ int strips_of(int vocab) { return (vocab + STRIP - 1) / STRIP; }

// --- numbers ------------------------------------------------------------------------------------

// Ordered as the floats are; NaN above everything, both zeros alike.
__device__ __forceinline__ uint32_t key_of(float x) {
  if (x != x) return 0xFFFFFFFFu;
  uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// Ordered by (logit ascending, id descending).
__device__ __forceinline__ u64 composite(float x, int id) {
  return static_cast<u64>(key_of(x)) << 32 | static_cast<uint32_t>(~id);
}

__device__ __forceinline__ int id_of(u64 item) { return static_cast<int>(~static_cast<uint32_t>(item)); }
__device__ __forceinline__ float logit_of(u64 item) { return value_of(static_cast<uint32_t>(item >> 32)); }

__device__ __forceinline__ u64 weight_of(float distance, float inverse_temperature) {
  return static_cast<u64>(expf(-distance * inverse_temperature) * static_cast<float>(ONE));
}

// Cumulative weight that top-p asks for, and the one that the draw must exceed. Both rise with their mass.
__device__ __forceinline__ u64 share_of(u64 mass, double top_p) {
  double wanted = top_p * static_cast<double>(mass);
  u64 whole = static_cast<u64>(wanted);
  return whole + (static_cast<double>(whole) < wanted ? 1 : 0);
}

__device__ __forceinline__ u64 target_of(u64 mass, double uniform) {
  u64 target = static_cast<u64>(uniform * static_cast<double>(mass));
  return target < mass ? target : mass - 1;
}

// wicore.sampling.uniforms: counter (position, position >> 32, 0, 0), key seed; 53 bits of the first two
// words.
__device__ double uniform_of(long long seed, long long position) {
  const u64 counter = static_cast<u64>(position), key = static_cast<u64>(seed);
  const uint4 bits =
      philox(make_uint4(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0),
             make_uint2(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)));
  const u64 number = (static_cast<u64>(bits.y) << 32 | bits.x) >> 11;
  return static_cast<double>(number) * (1.0 / 9007199254740992.0);
}

// --- 64-bit reductions --------------------------------------------------------------------------

__device__ __forceinline__ u64 warp_max64(u64 v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    u64 other = __shfl_xor_sync(0xffffffffu, v, mask);
    v = other > v ? other : v;
  }
  return v;
}

__device__ __forceinline__ u64 warp_scan64(u64 v) {  // inclusive
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    u64 other = __shfl_sync(0xffffffffu, v, lane >= step ? lane - step : lane);
    if (lane >= step) v += other;
  }
  return v;
}

// Maximum over the block, the same in every thread; `scratch` holds 32.
__device__ __forceinline__ u64 block_max64(u64 v, u64* scratch) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  v = warp_max64(v);
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_max64(lane < warps ? scratch[lane] : 0);
}

__device__ __forceinline__ u64 block_min64(u64 v, u64* scratch) { return ~block_max64(~v, scratch); }

// Sum of `v` over the threads before this one, and over all in `total`; `scratch` holds 32.
__device__ __forceinline__ u64 block_scan64(u64 v, u64& total, u64* scratch) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  u64 mine = warp_scan64(v);
  __syncthreads();
  if (lane == 31) scratch[warp] = mine;
  __syncthreads();
  u64 sums = warp_scan64(lane < warps ? scratch[lane] : 0);
  total = __shfl_sync(0xffffffffu, sums, 31);
  u64 before = __shfl_sync(0xffffffffu, sums, warp > 0 ? warp - 1 : 0);
  return mine - v + (warp > 0 ? before : 0);
}

// --- the row ------------------------------------------------------------------------------------

// Four logits from `id` on, a multiple of 4; -inf outside of the vocabulary and where `mask` forbids.
__device__ __forceinline__ void load_logits(float (&x)[4], const float* logits, const uint32_t* mask, int id,
                                            int vocab) {
  const float banned = -INFINITY;
  if (vocab % 4 == 0) {
    float4 v = make_float4(banned, banned, banned, banned);
    if (id < vocab) v = *reinterpret_cast<const float4*>(logits + id);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = id + i < vocab ? logits[id + i] : banned;
  }
  if (mask != nullptr && id < vocab) {
    uint32_t bits = mask[id / 32] >> (id % 32);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(bits >> i & 1)) x[i] = banned;
  }
}

__device__ __forceinline__ int id_in_strip(int strip, int part) {
  return strip * STRIP + part * 128 + threadIdx.x % 32 * 4;
}

// The sixteen logits of this lane in a warp's strip, part by part.
__device__ __forceinline__ void load_strip(float (&x)[4][4], const float* logits, const uint32_t* mask,
                                           int strip, int vocab) {
#pragma unroll
  for (int part = 0; part < 4; ++part) load_logits(x[part], logits, mask, id_in_strip(strip, part), vocab);
}

// The strip's best composite.
__device__ __forceinline__ u64 strip_best(const float (&x)[4][4], int strip) {
  float peak = -INFINITY;
  bool odd = false;  // fmaxf passes over NaN
#pragma unroll
  for (int part = 0; part < 4; ++part)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      peak = fmaxf(peak, x[part][i]);
      odd = odd || x[part][i] != x[part][i];
    }
  int id = 0;
#pragma unroll
  for (int part = 3; part >= 0; --part)
#pragma unroll
    for (int i = 3; i >= 0; --i)
      if (x[part][i] == peak) id = id_in_strip(strip, part) + i;
  return warp_max64(odd ? ~0ull : composite(peak, id));
}

// Sum over the block, warp after warp, of exp((x - peak) * inverse_temperature).
__device__ float weights_sum(const float (&x)[4][4], float peak, float inverse_temperature, float* scratch) {
  float sum = 0.0f;
  if (peak > -INFINITY) {
#pragma unroll
    for (int part = 0; part < 4; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += expf((x[part][i] - peak) * inverse_temperature);
  }
  return block_sum(sum, scratch);
}

// grid (chunks, rows), 256 threads.
//   best [rows][chunks]       the chunk's best composite
//   sums [rows][chunks]       of exp((x - the chunk's maximum) / temperature)
//   strips [rows][strips]   keys of the maxima; raw_strips and raw_sums before any change, at temperature 1
//   mass, count [rows][BINS], filled [rows]   set to zero for the kernels after this one
extern "C" __global__ void __launch_bounds__(256)
    sample_scan(int vocab, const SampledRow* rows, float* all_logits, u64* best, float* sums,
                uint32_t* strips, float* raw_sums, uint32_t* raw_strips, u64* mass, uint32_t* count,
                int* filled) {
  __shared__ u64 scratch64[32];
  __shared__ float scratch[32];
  pdl_launch();
  pdl_wait();
  const int index = blockIdx.y, chunk = blockIdx.x, chunks = chunks_of(vocab), strip_count = strips_of(vocab);
  const SampledRow& row = rows[index];
  if (row.source < 0) return;
  float* logits = all_logits + static_cast<long long>(row.source) * vocab;
  const int strip = chunk * (CHUNK / STRIP) + threadIdx.x / 32;
  const bool first_lane = threadIdx.x % 32 == 0;
  const int touched = row.bias_count + row.seen_count;
  float x[4][4];

  if (row.mode == FILTERED) {
    for (int bin = chunk * 256 + threadIdx.x; bin < BINS; bin += chunks * 256) {
      mass[index * BINS + bin] = 0;
      count[index * BINS + bin] = 0;
    }
    if (chunk == 0 && threadIdx.x == 0) filled[index] = 0;
  }

  if (row.wanted >= 0) {
    load_strip(x, logits, nullptr, strip, vocab);
    u64 item = strip_best(x, strip);
    if (first_lane && strip < strip_count)
      raw_strips[index * strip_count + strip] = static_cast<uint32_t>(item >> 32);
    float peak = logit_of(block_max64(item, scratch64));
    float sum = weights_sum(x, peak, 1.0f, scratch);
    if (threadIdx.x == 0) raw_sums[index * chunks + chunk] = sum;
  }

  if (touched > 0) {
    __syncthreads();  // every thread has read what is about to change
    const int from = chunk * CHUNK, to = min(from + CHUNK, vocab);
    for (int i = threadIdx.x; i < row.bias_count; i += 256) {
      int2 entry = row.entries[i];
      if (entry.x < from || entry.x >= to) continue;
      float value = logits[entry.x];
      row.raw[i] = value;
      logits[entry.x] = value + __int_as_float(entry.y);
    }
    __syncthreads();
    for (int i = row.bias_count + threadIdx.x; i < touched; i += 256) {
      int2 entry = row.entries[i];
      if (entry.x < from || entry.x >= to) continue;
      float value = logits[entry.x], times = __int_as_float(entry.y);
      row.raw[i] = value;
      value = value > 0.0f ? value / row.repetition : value * row.repetition;
      value -= row.frequency * times;
      if (times > 0.0f) value -= row.presence;
      logits[entry.x] = value;
    }
    __syncthreads();
  }

  load_strip(x, logits, row.mask, strip, vocab);
  u64 item = strip_best(x, strip);
  if (first_lane && strip < strip_count)
    strips[index * strip_count + strip] = static_cast<uint32_t>(item >> 32);
  item = block_max64(item, scratch64);
  if (threadIdx.x == 0) best[index * chunks + chunk] = item;
  if (row.mode == GREEDY) return;
  float sum = weights_sum(x, logit_of(item), row.inverse_temperature, scratch);
  if (threadIdx.x == 0) sums[index * chunks + chunk] = sum;
}

// --- filters ------------------------------------------------------------------------------------

// The best composite of a row; every warp reads all chunks, which is faster than to share.
__device__ __forceinline__ u64 row_best(const u64* best, int chunks) {
  u64 item = 0;
  for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32)
    item = best[chunk] > item ? best[chunk] : item;
  return warp_max64(item);
}

__device__ __forceinline__ bool usable(uint32_t key) { return key > KEY_NO_TOKEN && key < KEY_INFINITE; }

// Which tokens can be kept at all: those at most `range` under `peak`. They fall into BINS equal bins.
struct Range {
  float peak, range, scale;
  u64 total;  // weight of the whole row, to float32's precision
};

__device__ __forceinline__ int bin_of(const Range& range, float distance) {
  int bin = static_cast<int>(distance * range.scale);
  return bin < BINS ? bin : BINS - 1;
}

// The k-th largest of n keys, 0 < k <= n; `found` is shared. Every thread must call it.
__device__ uint32_t kth_key(const uint32_t* keys, int stride, int n, int k, uint32_t* found) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    uint32_t mine = keys[i * stride];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < n; ++j) {
      uint32_t other = keys[j * stride];
      rank += other > mine || (other == mine && j < i) ? 1 : 0;
    }
    if (rank == k - 1) *found = mine;
  }
  __syncthreads();
  return *found;
}

// Each filter bounds what it can keep; the exact cut comes later. Every thread must call it.
__device__ Range range_of(const SampledRow& row, u64 peak, const u64* best, const float* sums,
                          const uint32_t* strips, int vocab, uint32_t* found) {
  const int chunks = chunks_of(vocab), strip_count = strips_of(vocab);
  Range result;
  result.peak = logit_of(peak);
  float limit = WEIGHTLESS * row.temperature;
  const bool counts_all =
      row.top_k > 0 && row.top_p < 1.0;  // what top-k keeps is what top-p takes its share of
  if (!counts_all) limit = fminf(limit, row.min_p_distance);
  float total = 0.0f;
  for (int chunk = threadIdx.x % 32; chunk < chunks; chunk += 32) {
    float peak_of_chunk = logit_of(best[chunk]);
    total += sums[chunk] * expf((peak_of_chunk - result.peak) * row.inverse_temperature);
  }
  total = warp_sum(total);
  result.total = static_cast<u64>(static_cast<double>(total) * static_cast<double>(ONE));
  // Tokens that weigh less than (1 - top_p) * total / vocab each make less than (1 - top_p) * total together.
  if (row.top_p < 1.0 && !counts_all)
    limit = fminf(limit, row.share_distance + (1e-3f - logf(total)) * row.temperature);
  if (row.top_k > 0 && row.top_k <= strip_count) {
    // At least k tokens reach the k-th largest of the maxima.
    const uint32_t* tops = reinterpret_cast<const uint32_t*>(best) + 1;
    uint32_t key = row.top_k <= chunks ? kth_key(tops, 2, chunks, row.top_k, found)
                                       : kth_key(strips, 1, strip_count, row.top_k, found);
    if (key > KEY_NO_TOKEN) limit = fminf(limit, result.peak - value_of(key));
  }
  result.range = fmaxf(limit, 0.0f);
  result.scale = result.range > 1e-30f ? BINS / result.range : 0.0f;
  return result;
}

// grid (any, rows), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    sample_count(int vocab, const SampledRow* rows, const float* all_logits, const u64* all_best,
                 const float* all_sums, const uint32_t* all_strips, u64* mass, uint32_t* count) {
  __shared__ uint32_t low[BINS], high[BINS], tokens[BINS];
  __shared__ uint32_t found;
  pdl_launch();
  pdl_wait();
  const int index = blockIdx.y, chunks = chunks_of(vocab), strip_count = strips_of(vocab);
  const SampledRow& row = rows[index];
  if (row.source < 0 || row.mode != FILTERED) return;
  const u64* best = all_best + index * chunks;
  const uint32_t* strips = all_strips + index * strip_count;
  const u64 peak = row_best(best, chunks);
  if (!usable(static_cast<uint32_t>(peak >> 32))) return;
  for (int bin = threadIdx.x; bin < BINS; bin += 256) low[bin] = high[bin] = tokens[bin] = 0;
  const Range range = range_of(row, peak, best, all_sums + index * chunks, strips, vocab, &found);
  __syncthreads();

  const float* logits = all_logits + static_cast<long long>(row.source) * vocab;
  for (int strip = blockIdx.x * 8 + threadIdx.x / 32; strip < strip_count; strip += gridDim.x * 8) {
    if (!(range.peak - value_of(strips[strip]) <= range.range)) continue;
    float x[4][4];
    load_strip(x, logits, row.mask, strip, vocab);
#pragma unroll
    for (int part = 0; part < 4; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float distance = range.peak - x[part][i];
        if (!(distance <= range.range)) continue;
        int bin = bin_of(range, distance);
        u64 weight = weight_of(distance, row.inverse_temperature);
        // 64-bit atomics on shared memory are loops; of the 32-bit ones, whoever wraps the low word carries.
        uint32_t add = static_cast<uint32_t>(weight), rest = static_cast<uint32_t>(weight >> 32);
        uint32_t before = atomicAdd(&low[bin], add);
        if (before + add < before) ++rest;
        if (rest > 0) atomicAdd(&high[bin], rest);
        atomicAdd(&tokens[bin], 1u);
      }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < BINS; bin += 256) {
    if (tokens[bin] == 0) continue;
    atomicAdd(&mass[index * BINS + bin], static_cast<u64>(high[bin]) << 32 | low[bin]);
    atomicAdd(&count[index * BINS + bin], tokens[bin]);
  }
}

// Bins whose tokens decide the row: cuts and draw may fall nowhere else. BINS: nowhere.
struct Plan {
  int top_k, top_p, top_p_end, min_p, draw, draw_end;
  int tokens;
};

__device__ __forceinline__ bool decides(const Plan& plan, int bin) {
  return bin == plan.top_k || bin == plan.min_p || (bin >= plan.top_p && bin <= plan.top_p_end) ||
         (bin >= plan.draw && bin <= plan.draw_end);
}

// First bin at whose end the cumulative value is at least `wanted`; BINS if there is none.
template <typename T>
__device__ __forceinline__ int first_bin(const T* before, T wanted) {
  int low = 0, high = BINS;
  while (low < high) {
    int middle = (low + high) / 2;
    if (before[middle + 1] >= wanted)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

__device__ __forceinline__ u64 smaller(u64 a, u64 b) { return a < b ? a : b; }
__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// `mass_before` and `count_before`, BINS + 1 each, become the histogram's exclusive sums; `plan` is shared.
// Every thread must call it.
__device__ void make_plan(Plan* plan, const SampledRow& row, const Range& range, const u64* mass,
                          const uint32_t* count, u64* mass_before, uint32_t* count_before, u64* scratch) {
  const int each = BINS / blockDim.x, first = threadIdx.x * each;
  u64 my_mass = 0, my_count = 0, total, tokens;
  for (int bin = first; bin < first + each; ++bin) my_mass += mass[bin], my_count += count[bin];
  u64 run_mass = block_scan64(my_mass, total, scratch);
  u64 run_count = block_scan64(my_count, tokens, scratch);
  for (int bin = first; bin < first + each; ++bin) {
    mass_before[bin] = run_mass;
    count_before[bin] = static_cast<uint32_t>(run_count);
    run_mass += mass[bin], run_count += count[bin];
  }
  if (threadIdx.x == 0) {
    mass_before[BINS] = total;
    count_before[BINS] = static_cast<uint32_t>(tokens);
    plan->tokens = 0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    // What is kept is known only to lie between two masses until the tokens of the bins are seen.
    u64 low = total, high = total, whole_low = range.total, whole_high = range.total;
    plan->top_k = plan->top_p = plan->min_p = BINS;
    plan->top_p_end = 0;
    if (row.top_k > 0) {
      plan->top_k = first_bin(count_before, static_cast<uint32_t>(row.top_k));
      if (plan->top_k < BINS) low = mass_before[plan->top_k], high = mass_before[plan->top_k + 1];
      whole_low = larger(low, ONE), whole_high = high;
    }
    if (row.top_p < 1.0) {
      plan->top_p = first_bin(mass_before, share_of(whole_low, row.top_p));
      plan->top_p_end = first_bin(mass_before, share_of(whole_high, row.top_p));
      if (plan->top_p < BINS) low = smaller(low, mass_before[plan->top_p]);
      if (plan->top_p_end < BINS) high = smaller(high, mass_before[plan->top_p_end + 1]);
    }
    if (row.min_p_distance < range.range) {
      plan->min_p = bin_of(range, row.min_p_distance);
      low = smaller(low, mass_before[plan->min_p]);
      high = smaller(high, mass_before[plan->min_p + 1]);
    }
    double uniform = uniform_of(row.seed, row.position);
    plan->draw = first_bin(mass_before, target_of(larger(low, ONE), uniform) + 1);
    plan->draw_end = first_bin(mass_before, target_of(larger(high, ONE), uniform) + 1);
  }
  __syncthreads();
  int mine = 0;
  for (int bin = first; bin < first + each; ++bin)
    if (decides(*plan, bin)) mine += static_cast<int>(count_before[bin + 1] - count_before[bin]);
  if (mine > 0) atomicAdd(&plan->tokens, mine);
  __syncthreads();
}

// grid (any, rows), 256 threads. list [rows][CAPACITY] composites in no order.
extern "C" __global__ void __launch_bounds__(256)
    sample_gather(int vocab, const SampledRow* rows, const float* all_logits, const u64* all_best,
                  const float* all_sums, const uint32_t* all_strips, const u64* mass, const uint32_t* count,
                  u64* list, int* filled) {
  __shared__ u64 mass_before[BINS + 1], scratch[32];
  __shared__ uint32_t count_before[BINS + 1], found;
  __shared__ Plan plan;
  pdl_launch();
  pdl_wait();
  const int index = blockIdx.y, chunks = chunks_of(vocab), strip_count = strips_of(vocab);
  const SampledRow& row = rows[index];
  if (row.source < 0 || row.mode != FILTERED) return;
  const u64* best = all_best + index * chunks;
  const uint32_t* strips = all_strips + index * strip_count;
  const u64 peak = row_best(best, chunks);
  if (!usable(static_cast<uint32_t>(peak >> 32))) return;
  const Range range = range_of(row, peak, best, all_sums + index * chunks, strips, vocab, &found);
  make_plan(&plan, row, range, mass + index * BINS, count + index * BINS, mass_before, count_before, scratch);
  if (plan.tokens > CAPACITY) return;
  int last = BINS - 1;
  while (last > 0 && !decides(plan, last)) --last;

  const float* logits = all_logits + static_cast<long long>(row.source) * vocab;
  for (int strip = blockIdx.x * 8 + threadIdx.x / 32; strip < strip_count; strip += gridDim.x * 8) {
    float nearest = range.peak - value_of(strips[strip]);
    if (!(nearest <= range.range) || bin_of(range, nearest) > last) continue;
    float x[4][4];
    load_strip(x, logits, row.mask, strip, vocab);
#pragma unroll
    for (int part = 0; part < 4; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float distance = range.peak - x[part][i];
        if (!(distance <= range.range) || !decides(plan, bin_of(range, distance))) continue;
        int place = atomicAdd(&filled[index], 1);
        if (place < CAPACITY)
          list[index * CAPACITY + place] = composite(x[part][i], id_in_strip(strip, part) + i);
      }
  }
}

// --- the draw -----------------------------------------------------------------------------------

struct Selection {
  int vocab;
  const SampledRow* row;
  const float* logits;
  u64* scratch;  // 32
  u64* shared;   // a word that one thread writes and all read
  double uniform;
};

// By inverse CDF over the whole row in id order: first the chunk, then the token.
__device__ int draw_whole(const Selection& s, const u64* best, const float* sums, float peak) {
  const SampledRow& row = *s.row;
  const int chunks = chunks_of(s.vocab);
  double* rest = reinterpret_cast<double*>(s.shared);
  int* place = reinterpret_cast<int*>(s.shared + 1);
  if (threadIdx.x < 32) {
    // A lane takes neighbouring chunks, so that sums in id order are sums over lanes.
    const int each = (chunks + 31) / 32, first = threadIdx.x * each;
    double mine = 0.0;
    for (int chunk = first; chunk < min(first + each, chunks); ++chunk)
      mine +=
          static_cast<double>(sums[chunk] * expf((logit_of(best[chunk]) - peak) * row.inverse_temperature));
    double before = 0.0, total = 0.0;
    for (int lane = 0; lane < 32; ++lane) {
      double theirs = __shfl_sync(0xffffffffu, mine, lane);
      if (lane == threadIdx.x) before = total;
      total += theirs;
    }
    const double wanted = s.uniform * total;
    // Rounding can leave no chunk that goes beyond `wanted`: then it is the last one with weight.
    int chosen = -1;
    double left = 1.0;
    for (int chunk = first; chunk < min(first + each, chunks); ++chunk) {
      double weight =
          static_cast<double>(sums[chunk] * expf((logit_of(best[chunk]) - peak) * row.inverse_temperature));
      if (weight > 0.0 && chosen < 0 && before + weight > wanted) {
        chosen = chunk;
        left = fmax(wanted - before, 0.0) / weight;
      }
      before += weight;
    }
    int lowest = chosen < 0 ? chunks : chosen, last = -1;
    for (int chunk = first; chunk < min(first + each, chunks); ++chunk)
      if (sums[chunk] * expf((logit_of(best[chunk]) - peak) * row.inverse_temperature) > 0.0f) last = chunk;
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) {
      lowest = min(lowest, __shfl_xor_sync(0xffffffffu, lowest, mask));
      last = max(last, __shfl_xor_sync(0xffffffffu, last, mask));
    }
    if (lowest == chunks) {
      if (threadIdx.x == 0) *rest = 1.0, *place = last;
    } else if (chosen == lowest) {
      *rest = left, *place = chosen;
    }
  }
  __syncthreads();
  const int chunk = *place;
  const double left = *rest;
  const float chunk_peak = logit_of(best[chunk]);
  const int id = chunk * CHUNK + threadIdx.x * 4;
  float x[4];
  load_logits(x, s.logits, row.mask, id, s.vocab);
  u64 weights[4], mine = 0, total;
#pragma unroll
  for (int i = 0; i < 4; ++i) mine += weights[i] = weight_of(chunk_peak - x[i], row.inverse_temperature);
  u64 before = block_scan64(mine, total, s.scratch);
  const u64 target = target_of(total, fmin(left, 1.0));
  if (before <= target && target < before + mine) {
    int i = 0;
    while (i < 3 && before + weights[i] <= target) before += weights[i++];
    *s.shared = id + i;
  }
  __syncthreads();
  return static_cast<int>(*s.shared);
}

// Descending bitonic sort of `n`, a power of two, in shared memory.
__device__ void sort_descending(u64* list, int n) {
  for (int width = 2; width <= n; width *= 2)
    for (int step = width / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < n / 2; pair += blockDim.x) {
        int i = 2 * pair - (pair & (step - 1)), j = i + step;
        u64 a = list[i], b = list[j];
        if (((i & width) == 0) == (a < b)) list[i] = b, list[j] = a;
      }
    }
  __syncthreads();
}

// The list has every token of the bins that decide. `list` is shared, CAPACITY.
__device__ int draw_listed(const Selection& s, const Range& range, const Plan& plan, const u64* found,
                           u64* list, u64* mass_before, uint32_t* count_before) {
  const SampledRow& row = *s.row;
  const int n = plan.tokens;
  int padded = 1;
  while (padded < n) padded *= 2;
  for (int i = threadIdx.x; i < padded; i += blockDim.x) list[i] = i < n ? found[i] : 0;
  sort_descending(list, padded);

  const u64 everything = mass_before[BINS];
  const bool top_k_cuts = plan.top_k < BINS;
  const u64 under_min_p = plan.min_p < BINS ? mass_before[plan.min_p] : 0;
  const int each = CAPACITY / SELECT_THREADS, first = threadIdx.x * each;
  u64 weights[CAPACITY / SELECT_THREADS], cumulative[CAPACITY / SELECT_THREADS], mine = 0, listed;
  float distances[CAPACITY / SELECT_THREADS];
#pragma unroll
  for (int e = 0; e < each; ++e) {
    bool exists = first + e < n;
    distances[e] = exists ? range.peak - logit_of(list[first + e]) : 0.0f;
    weights[e] = exists ? weight_of(distances[e], row.inverse_temperature) : 0;
    mine += weights[e];
  }
  u64 running = block_scan64(mine, listed, s.scratch);
  // Where a bin's run begins, take what the list has before it out of what the row has before it.
#pragma unroll
  for (int e = 0; e < each; ++e) {
    int i = first + e;
    if (i < n) {
      int bin = bin_of(range, distances[e]);
      if (i == 0 || bin_of(range, range.peak - logit_of(list[i - 1])) != bin) {
        mass_before[bin] -= running;
        count_before[bin] -= i;
      }
    }
    running += weights[e];
    cumulative[e] = running;
  }
  if (threadIdx.x == 0) *s.shared = everything;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < each; ++e) {
    int i = first + e;
    if (i >= n) continue;
    int bin = bin_of(range, distances[e]);
    cumulative[e] += mass_before[bin];
    if (top_k_cuts && count_before[bin] + i + 1 == static_cast<uint32_t>(row.top_k))
      *s.shared = cumulative[e];
  }
  __syncthreads();
  u64 kept = *s.shared;
  if (row.top_p < 1.0) {
    const u64 wanted = share_of(row.top_k > 0 ? kept : range.total, row.top_p);
    u64 cut = ~0ull;
#pragma unroll
    for (int e = 0; e < each; ++e)
      if (first + e < n && cumulative[e] >= wanted) cut = smaller(cut, cumulative[e]);
    kept = smaller(kept, block_min64(cut, s.scratch));
  }
  if (plan.min_p < BINS) {
    u64 cut = under_min_p;
#pragma unroll
    for (int e = 0; e < each; ++e)
      if (first + e < n && distances[e] <= row.min_p_distance) cut = larger(cut, cumulative[e]);
    kept = smaller(kept, block_max64(cut, s.scratch));
  }
  const u64 target = target_of(kept, s.uniform);
  __syncthreads();  // every thread has read the word
#pragma unroll
  for (int e = 0; e < each; ++e)
    if (first + e < n && cumulative[e] > target && cumulative[e] - weights[e] <= target)
      *s.shared = static_cast<u64>(id_of(list[first + e]));
  __syncthreads();
  return static_cast<int>(*s.shared);
}

// Tokens within `range` whose key is at least `key`: how many, and their weight. Every thread must call it.
__device__ void reach(const Selection& s, const Range& range, uint32_t key, u64& mass, u64& count) {
  u64 my_mass = 0, my_count = 0;
  for (int id = threadIdx.x * 4; id < s.vocab; id += SELECT_THREADS * 4) {
    float x[4];
    load_logits(x, s.logits, s.row->mask, id, s.vocab);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float distance = range.peak - x[i];
      if (!(distance <= range.range) || key_of(x[i]) < key) continue;
      my_mass += weight_of(distance, s.row->inverse_temperature);
      my_count += 1;
    }
  }
  block_scan64(my_mass, mass, s.scratch);
  block_scan64(my_count, count, s.scratch);
}

// The place in the order (logit descending, id ascending) at which mass, or count, first is at least
// `wanted`.
struct Place {
  uint32_t key;  // of the token there; 0: there is none
  u64 before;    // what the larger logits have
  u64 ordinal;   // which of the equal logits, from 1
  u64 mass;      // up to and with the token
};

__device__ Place find_place(const Selection& s, const Range& range, bool by_count, u64 wanted) {
  u64 mass, count;
  Place place = {0, 0, 0, 0};
  reach(s, range, 0, mass, count);
  if ((by_count ? count : mass) < wanted) return place;
  uint32_t low = 1, high = key_of(range.peak);  // the answer is in [low, high]
  while (low < high) {
    uint32_t middle = low + (high - low) / 2 + 1;
    reach(s, range, middle, mass, count);
    if ((by_count ? count : mass) >= wanted)
      low = middle;
    else
      high = middle - 1;
  }
  place.key = low;
  reach(s, range, low + 1, mass, count);
  place.before = by_count ? count : mass;
  const u64 weight = weight_of(range.peak - value_of(low), s.row->inverse_temperature);
  const u64 missing = wanted - place.before;
  place.ordinal = by_count ? missing : (missing + weight - 1) / weight;
  place.mass = mass + place.ordinal * weight;
  return place;
}

// Without a list, for rows with more equal logits than one holds: slow, and exact.
__device__ int draw_searched(const Selection& s, const Range& range) {
  const SampledRow& row = *s.row;
  u64 kept, count;
  reach(s, range, 0, kept, count);
  if (row.top_k > 0) {
    Place cut = find_place(s, range, true, row.top_k);
    if (cut.key > 0) kept = cut.mass;
  }
  u64 after_min_p = kept;
  if (row.min_p_distance < range.range) {
    Range nearer = range;
    nearer.range = row.min_p_distance;
    reach(s, nearer, 0, after_min_p, count);
  }
  if (row.top_p < 1.0) {
    Place cut = find_place(s, range, false, share_of(row.top_k > 0 ? kept : range.total, row.top_p));
    if (cut.key > 0) kept = smaller(kept, cut.mass);
  }
  kept = smaller(kept, after_min_p);
  const Place place = find_place(s, range, false, target_of(kept, s.uniform) + 1);

  const int each = (s.vocab + SELECT_THREADS - 1) / SELECT_THREADS, first = threadIdx.x * each;
  u64 mine = 0, all;
  for (int pass = 0; pass < 2; ++pass) {
    u64 before = pass == 0 ? 0 : block_scan64(mine, all, s.scratch);
    for (int id = first; id < min(first + each, s.vocab); ++id) {
      bool allowed = row.mask == nullptr || (row.mask[id / 32] >> (id % 32) & 1);
      if (!allowed || key_of(s.logits[id]) != place.key) continue;
      if (pass == 0)
        ++mine;
      else if (++before == place.ordinal)
        *s.shared = id;
    }
  }
  __syncthreads();
  return static_cast<int>(*s.shared);
}

// --- logprobs -----------------------------------------------------------------------------------

// The raw logits' maximum and sum, and the likeliest tokens. The best k tokens are in the best k strips,
// strips in the order of their best token.
__device__ void report(const Selection& s, const uint32_t* strips, const float* sums, SampledResult* result,
                       uint32_t* keys, int* chosen) {
  const int chunks = chunks_of(s.vocab), strip_count = strips_of(s.vocab);
  const int wanted = s.row->wanted, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < strip_count; i += SELECT_THREADS) keys[i] = strips[i];
  __syncthreads();
  uint32_t peak_key = 0;
  for (int i = lane; i < strip_count; i += 32) peak_key = max(peak_key, keys[i]);
  const u64 best_strip = warp_max64(static_cast<u64>(peak_key) << 32);
  const float peak = logit_of(best_strip);
  if (!usable(static_cast<uint32_t>(best_strip >> 32))) {  // the mask hid it
    if (threadIdx.x == 0) result->id = -1, result->peak = peak;
    return;
  }
  if (warp == 0) {
    double total = 0.0;
    for (int chunk = lane; chunk < chunks; chunk += 32) {
      uint32_t key = 0;
      for (int i = chunk * (CHUNK / STRIP); i < min((chunk + 1) * (CHUNK / STRIP), strip_count); ++i)
        key = max(key, keys[i]);
      total += static_cast<double>(sums[chunk] * expf(value_of(key) - peak));
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) total += __shfl_xor_sync(0xffffffffu, total, mask);
    if (lane == 0) result->total = total, result->peak = peak;
  }
  const int strips_wanted = min(wanted, strip_count);
  for (int i = threadIdx.x; i < strip_count; i += SELECT_THREADS) {
    uint32_t mine = keys[i];
    int rank = 0;
#pragma unroll 8
    for (int j = 0; j < strip_count; ++j) rank += keys[j] > mine || (keys[j] == mine && j < i) ? 1 : 0;
    if (rank < strips_wanted) chosen[rank] = i;
  }
  __syncthreads();

  const int each = TOP * STRIP / SELECT_THREADS;
  u64 items[TOP * STRIP / SELECT_THREADS], best = 0;
#pragma unroll
  for (int e = 0; e < each; ++e) {
    int place = threadIdx.x + e * SELECT_THREADS, id = s.vocab;
    if (place / STRIP < strips_wanted) id = chosen[place / STRIP] * STRIP + place % STRIP;
    items[e] = id < s.vocab ? composite(s.logits[id], id) : 0;
    best = larger(best, items[e]);
  }
  best = warp_max64(best);
  int count = 0;
  for (; count < wanted; ++count) {
    __syncthreads();
    if (lane == 0) s.scratch[warp] = best;
    __syncthreads();
    const u64 item = warp_max64(lane < SELECT_THREADS / 32 ? s.scratch[lane] : 0);
    if (static_cast<uint32_t>(item >> 32) <= KEY_NO_TOKEN) break;
    if (threadIdx.x == 0) result->ids[count] = id_of(item), result->raws[count] = logit_of(item);
    if (item != best) continue;  // of the whole warp or of none of it
    best = 0;
#pragma unroll
    for (int e = 0; e < each; ++e)
      if (items[e] < item) best = larger(best, items[e]);
    best = warp_max64(best);
  }
  if (threadIdx.x == 0) result->count = count;
}

// grid (rows), SELECT_THREADS threads. Shared: the list, then the histogram's sums.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS)
    sample_select(int vocab, const SampledRow* rows, float* all_logits, const u64* all_best,
                  const float* all_sums, const uint32_t* all_strips, const float* raw_sums,
                  const uint32_t* raw_strips, const u64* mass, const uint32_t* count, const u64* lists,
                  SampledResult* results) {
  SHARED_MEMORY(u64, list);
  u64* mass_before = list + CAPACITY;
  uint32_t* count_before = reinterpret_cast<uint32_t*>(mass_before + BINS + 1);
  __shared__ u64 scratch[32], word[2];
  __shared__ Plan plan;
  __shared__ uint32_t found;
  __shared__ int chosen[TOP];
  pdl_launch();
  pdl_wait();
  const int index = blockIdx.x, chunks = chunks_of(vocab), strip_count = strips_of(vocab);
  const SampledRow& row = rows[index];
  if (row.source < 0) return;
  float* logits = all_logits + static_cast<long long>(row.source) * vocab;
  const u64* best = all_best + index * chunks;
  const float* sums = all_sums + index * chunks;
  SampledResult* result = results + index;
  const u64 peak = row_best(best, chunks);
  const uint32_t peak_key = static_cast<uint32_t>(peak >> 32);
  if (!usable(peak_key)) {
    if (threadIdx.x == 0) {
      result->id = -1;
      result->peak = logit_of(peak);
    }
    return;
  }
  Selection s = {vocab,   &row, logits,
                 scratch, word, row.mode == GREEDY ? 0.0 : uniform_of(row.seed, row.position)};
  int token;
  if (row.mode == GREEDY) {
    token = id_of(peak);
  } else if (row.mode == WHOLE) {
    token = draw_whole(s, best, sums, logit_of(peak));
  } else {
    const Range range = range_of(row, peak, best, sums, all_strips + index * strip_count, vocab, &found);
    make_plan(&plan, row, range, mass + index * BINS, count + index * BINS, mass_before, count_before,
              scratch);
    token = plan.tokens <= CAPACITY
                ? draw_listed(s, range, plan, lists + static_cast<long long>(index) * CAPACITY, list,
                              mass_before, count_before)
                : draw_searched(s, range);
  }
  if (threadIdx.x == 0) result->id = token, result->count = 0;
  if (row.wanted < 0) return;
  // Undo what was added to the logits, last first.
  const int touched = row.bias_count + row.seen_count;
  for (int i = row.bias_count + threadIdx.x; i < touched; i += SELECT_THREADS)
    logits[row.entries[i].x] = row.raw[i];
  __syncthreads();
  for (int i = threadIdx.x; i < row.bias_count; i += SELECT_THREADS) logits[row.entries[i].x] = row.raw[i];
  __syncthreads();
  if (threadIdx.x == 0) result->raw = logits[token];
  report(s, raw_strips + index * strip_count, raw_sums + index * chunks, result,
         reinterpret_cast<uint32_t*>(list), chosen);
}
