// Weights to half: from what a checkpoint stores, or from nothing.
#include "common.cuh"
#include "random.cuh"

#define THREADS 256
#define EACH 8  // elements of a thread

// What half cannot hold: how many, and the bits of the largest magnitude (a NaN is above all).
struct Unfit {
  uint32_t count, largest;
};

__device__ __forceinline__ float from_bfloat16(uint32_t bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float from_half(uint32_t bits) {
  unsigned short low = static_cast<unsigned short>(bits);
  return __half2float(*reinterpret_cast<half*>(&low));
}

// 65520 and above round to infinity.
__device__ __forceinline__ void check(float (&x)[EACH], Unfit* unfit) {
  uint32_t count = 0, largest = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    uint32_t magnitude = __float_as_uint(x[i]) & 0x7FFFFFFFu;
    if (magnitude < __float_as_uint(65520.0f)) continue;
    ++count;
    largest = max(largest, magnitude);
  }
  if (count == 0) return;
  atomicAdd(&unfit->count, count);
  atomicMax(&unfit->largest, largest);
}

__device__ __forceinline__ void store(half* target, const float (&x)[EACH], int present) {
  if (present == EACH) {
    *reinterpret_cast<uint4*>(target) = make_uint4(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]),
                                                   pack_half2(x[4], x[5]), pack_half2(x[6], x[7]));
    return;
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i)
    if (i < present) target[i] = __float2half_rn(x[i]);
}

// 16-bit elements, two a word. Source and target are aligned to 16 bytes.
template <typename Decode>
__device__ __forceinline__ void convert_narrow(const unsigned short* source, half* target, long long count,
                                               Unfit* unfit, Decode decode) {
  const long long first = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * EACH;
  if (first >= count) return;
  const int present = static_cast<int>(count - first < EACH ? count - first : EACH);
  float x[EACH];
  if (present == EACH) {
    const uint4 words = load_once(source + first);
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = decode(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xFFFFu);
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = i < present ? decode(source[first + i]) : 0.0f;
  }
  check(x, unfit);
  store(target + first, x, present);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    convert_bf16(const unsigned short* source, half* target, long long count, Unfit* unfit) {
  convert_narrow(source, target, count, unfit, from_bfloat16);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    convert_f16(const unsigned short* source, half* target, long long count, Unfit* unfit) {
  convert_narrow(source, target, count, unfit, from_half);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    convert_f32(const float* source, half* target, long long count, Unfit* unfit) {
  const long long first = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * EACH;
  if (first >= count) return;
  const int present = static_cast<int>(count - first < EACH ? count - first : EACH);
  float x[EACH];
  if (present == EACH) {
    const uint4 low = load_once(source + first), high = load_once(source + first + 4);
    const uint32_t words[EACH] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = __uint_as_float(words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < EACH; ++i) x[i] = i < present ? source[first + i] : 0.0f;
  }
  check(x, unfit);
  store(target + first, x, present);
}

__device__ __forceinline__ float nearest_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return __uint_as_float((bits + 0x7FFFu + (bits >> 16 & 1u)) & 0xFFFF0000u);
}

// Uniform in +-sqrt(3) * deviation, which is its deviation, of 8 significant bits (bfloat16), as Gemma's
// published weights are: what a product's multipliers draw, and so the clock at the card's power limit, depends on
// how many bits there are. The elements depend on seed, stream and place.
extern "C" __global__ void __launch_bounds__(THREADS)
    fill_random(half* target, long long count, long long seed, int stream, float deviation) {
  const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x, first = index * EACH;
  if (first >= count) return;
  const unsigned long long key = static_cast<unsigned long long>(seed);
  const uint4 bits = philox(make_uint4(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                                       static_cast<uint32_t>(stream), 1u),
                            make_uint2(static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)));
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  const float step = deviation * 1.7320508f / 32768.0f;
  float x[EACH];
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const uint32_t value = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFFu;
    x[i] = nearest_bf16((static_cast<float>(value) - 32767.5f) * step);
  }
  store(target + first, x, static_cast<int>(count - first < EACH ? count - first : EACH));
}
