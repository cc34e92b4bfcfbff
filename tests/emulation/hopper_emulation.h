// Twins of hopper.cuh for the CPU emulation. They decode tensor maps, swizzle and matrix descriptors bit by bit, so
// that a wrong offset is found without the card.
//
// One launched block stands for a whole cluster: CLUSTER times THREADS threads and CLUSTER times SHARED_BYTES
// bytes. A shared address is the offset in the block's part. A box is copied at once, the earliest that the
// card could; products are made when they are waited for, the latest: what is read, freed or overwritten too
// early shows in the result.
#pragma once

#ifndef __cluster_dims__
#define __cluster_dims__(...)
#endif

#define WGMMA_OF_TILES(N)
#define WGMMA_OF_REGISTERS(N)

using TensorMap = CUtensorMap;  // in plain fields

inline int block_thread() { return threadIdx.x % THREADS; }
inline int cluster_rank() { return threadIdx.x / THREADS; }
inline int cluster_index() { return blockIdx.x; }
inline int cluster_count() { return gridDim.x; }
inline void cluster_sync() { __syncthreads(); }

namespace emulated {

struct Product {
  float* sums;
  int columns;
  uint64_t a, b;
  bool add;
  const uint32_t* registers;  // of A, where it is not in shared memory
  uint32_t held[4];           // what they held when the product was asked for
  float rows[2][16];          // of A, this thread's
};

struct Products {
  std::vector<Product> made;    // and not yet carried out
  std::vector<size_t> groups;   // how many belong to each committed group
  size_t committed;             // products in groups
};

inline char* shared_parts;
inline Products products[::emulation::kThreads];

inline Products& own_products() { return products[::emulation::state.current->number]; }

inline char* shared_at(uint32_t address, int rank) {
  if (address >= SHARED_BYTES) ::emulation::fail("shared address %u: a block has %d", address, SHARED_BYTES);
  return shared_parts + static_cast<size_t>(rank) * SHARED_BYTES + address;
}

// The swizzle of 128 bytes: bits 4 to 6 of an address are turned by bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// A phase ends when nobody is awaited and as many bytes have come as were announced.
struct PhaseBarrier {
  uint16_t awaited;
  uint16_t arrivals : 15, parity : 1;
  int32_t bytes;
  void settle() {
    if (awaited || bytes) return;
    awaited = arrivals;
    parity ^= 1;
  }
};
static_assert(sizeof(PhaseBarrier) == 8, "a barrier in shared memory has 8 bytes");

inline PhaseBarrier& phase_barrier(uint32_t barrier, int rank) {
  if (barrier % 8) ::emulation::fail("barrier at shared address %u: not aligned to 8", barrier);
  return *reinterpret_cast<PhaseBarrier*>(shared_at(barrier, rank));
}

// Value k of row r of the operand that a matrix descriptor names.
inline float operand(uint64_t descriptor, int r, int k) {
  uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + r / 8 * stride + r % 8 * 128 + k * 2;
  return __half2float(*reinterpret_cast<const half*>(shared_at(swizzled(address), cluster_rank())));
}

// Value k of column n of a transposed operand.
inline float transposed_operand(uint64_t descriptor, int n, int k) {
  uint32_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t panel = (descriptor >> 16 & 0x3fff) << 4;
  uint32_t address = start + n / 64 * panel + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
  return __half2float(*reinterpret_cast<const half*>(shared_at(swizzled(address), cluster_rank())));
}

inline void carry_out(Product& product) {
  int thread = threadIdx.x % 128, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  if (product.registers) {
    if (std::memcmp(product.registers, product.held, sizeof product.held))
      ::emulation::fail("the registers of a product under way were written");
  } else {
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 16; ++k) product.rows[i][k] = operand(product.a, row + 8 * i, k);
  }
  for (int j = 0; j < product.columns / 8; ++j)
    for (int c = 0; c < 2; ++c) {
      float sums[2] = {0.0f, 0.0f};
      for (int k = 0; k < 16; ++k) {
        int n = 8 * j + column + c;
        float v = product.registers ? transposed_operand(product.b, n, k) : operand(product.b, n, k);
        sums[0] += product.rows[0][k] * v;
        sums[1] += product.rows[1][k] * v;
      }
      for (int i = 0; i < 2; ++i) {
        float& d = product.sums[4 * j + 2 * i + c];
        d = product.add ? d + sums[i] : sums[i];
      }
    }
}

// Each lane's two rows of A from the registers of its quad.
inline void share_rows(void** args, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    Product& product = *static_cast<Product*>(args[lane]);
    for (int other = 0; other < 4; ++other) {
      const uint32_t* held = static_cast<Product*>(args[lane / 4 * 4 + other])->held;
      for (int i = 0; i < 4; ++i)
        for (int half_ = 0; half_ < 2; ++half_)
          product.rows[i % 2][i / 2 * 8 + other * 2 + half_] =
              ::emulation::to_float(static_cast<uint16_t>(held[i] >> 16 * half_));
    }
  }
}

inline void check_descriptor(uint64_t descriptor) {
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7))
    ::emulation::fail("a matrix descriptor of another layout");
}

}  // namespace emulated

inline uint32_t shared_begin(char* memory) {
  uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + 1023) & ~uintptr_t(1023);
  emulated::shared_parts = reinterpret_cast<char*>(begin);
  emulated::Products& p = emulated::own_products();
  p.made.clear();
  p.groups.clear();
  p.committed = 0;
  return 0;
}

inline void* shared_pointer(uint32_t address) { return emulated::shared_at(address, cluster_rank()); }

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emulated::PhaseBarrier& b = emulated::phase_barrier(barrier, cluster_rank());
  b.awaited = static_cast<uint16_t>(arrivals);
  b.arrivals = arrivals;
  b.parity = 0;
  b.bytes = 0;
}

inline void barrier_init_fence() {}

inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  emulated::PhaseBarrier& b = emulated::phase_barrier(barrier, rank);
  if (b.awaited == 0) emulation::fail("barrier at shared address %u: too many arrivals", barrier);
  --b.awaited;
  b.settle();
}

inline void barrier_arrive(uint32_t barrier) { barrier_arrive_at(barrier, cluster_rank()); }

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  emulated::phase_barrier(barrier, cluster_rank()).bytes += static_cast<int32_t>(bytes);
  barrier_arrive(barrier);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  while (emulated::phase_barrier(barrier, cluster_rank()).parity == parity) emulated_yield();
  emulated_progress();
}

// Numbers 1 to 8 are wgmma_wait's.
inline void named_barrier_wait(int barrier, int count) { emulation::barrier(barrier, count); }
inline void named_barrier_arrive(int barrier, int count) { emulation::barrier_arrive(barrier, count); }
inline void shared_fence() {}
inline void prefetch_map(const TensorMap&) {}

inline void copy_box_to(uint32_t target, const TensorMap& map, int column, int row, uint32_t barrier,
                        uint32_t blocks) {
  if (map.swizzle_bytes != 128 || map.box_columns * map.element_bytes != 128)
    emulation::fail("a tensor map of another layout than rows of 128 swizzled bytes");
  if (target % 1024) emulation::fail("a box at shared address %u: not aligned to 1024", target);
  for (int rank = 0; rank < CLUSTER; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    for (uint32_t r = 0; r < map.box_rows; ++r)
      for (uint32_t c = 0; c < map.box_columns; ++c) {
        bool inside = row + r < map.rows && column + c < map.columns;
        uint64_t from = map.address + (row + r) * map.row_stride_bytes + (column + c) * 2;
        uint32_t to = emulated::swizzled(target + r * 128 + c * 2);
        *reinterpret_cast<uint16_t*>(emulated::shared_at(to, rank)) =
            inside ? *reinterpret_cast<const uint16_t*>(from) : 0;
      }
    emulated::PhaseBarrier& b = emulated::phase_barrier(barrier, rank);
    b.bytes -= static_cast<int32_t>(map.box_rows * 128);
    b.settle();
  }
}

inline void copy_box(uint32_t target, const TensorMap& map, int column, int row, uint32_t barrier) {
  copy_box_to(target, map, column, row, barrier, 1u << cluster_rank());
}

template <int REGISTERS>
void fewer_registers() {}
template <int REGISTERS>
void more_registers() {}

inline void wgmma_fence() {}

inline void wgmma_commit() {
  emulated::Products& p = emulated::own_products();
  p.groups.push_back(p.made.size() - p.committed);
  p.committed = p.made.size();
}

// On the card a product is one act of four warps; here each thread makes its own sums, so all must be waited
// for.
template <int N>
void wgmma_wait() {
  emulated::Products& p = emulated::own_products();
  while (p.groups.size() > N) {
    size_t count = p.groups.front();
    for (size_t i = 0; i < count; ++i) emulated::carry_out(p.made[i]);
    p.made.erase(p.made.begin(), p.made.begin() + static_cast<std::ptrdiff_t>(count));
    p.groups.erase(p.groups.begin());
    p.committed -= count;
  }
  emulation::barrier(1 + threadIdx.x / 128, 128);
}

template <int SUMS>
void wgmma(float (&d)[SUMS], uint64_t a, uint64_t b, uint32_t add) {
  for (uint64_t descriptor : {a, b}) emulated::check_descriptor(descriptor);
  emulated::own_products().made.push_back({d, 2 * SUMS, a, b, add != 0, nullptr, {}, {}});
}

template <int SUMS>
void wgmma(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b) {
  emulated::check_descriptor(b);
  emulated::Product product = {d, 2 * SUMS, 0, b, true, a, {a[0], a[1], a[2], a[3]}, {}};
  emulation::meet(0xffffffffu, "wgmma", emulated::share_rows, &product);
  emulated::own_products().made.push_back(product);
}

template <int SUMS>
void wgmma_settled(float (&d)[SUMS]) {
  for (const emulated::Product& product : emulated::own_products().made)
    if (product.sums == d) emulation::fail("sums are read while products are under way");
}

template <int PIECES>
void wgmma_settled(uint32_t (&)[PIECES][4]) {}

inline float choose(int first, float a, float b) { return first ? a : b; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
