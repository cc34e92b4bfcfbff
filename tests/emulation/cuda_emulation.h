// Runs CUDA kernels on the CPU: what common.cuh needs of CUDA C++, for a host compiler.
//
// Every CUDA thread of a block is a fibre; the blocks run one after the other. A fibre runs until it meets a
// collective (barrier, shuffle, mma, ...) that others must reach too. Where all are stuck, the launch fails and
// says who waits for what. Odd blocks run their threads in descending order, so that a missing barrier shows.
// Shared memory begins as NaN, and so does the target of a copy_async until it is waited for.
//
// A launch that fails leaves its message in the caller's buffer; it never throws and never ends the process:
// accesses outside of mapped memory, misaligned ones and overruns of static arrays are caught as signals.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <link.h>
#include <pthread.h>
#include <sys/mman.h>

#ifndef WICORE_LISTING  // the list of kernels is made from preprocessed text in which __global__ still stands
#define __global__
#endif
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local  // so that they lie together (g++ ignores sections in templates): see find_static
#define __CUDA_ARCH__ 900

// --- vector types -------------------------------------------------------------------------------------------

#define WICORE_VECTORS(T, name, align2, align4)                                                  \
  struct name##1 { T x; };                                                                       \
  struct __align__(align2) name##2 { T x, y; };                                                  \
  struct name##3 { T x, y, z; };                                                                 \
  struct __align__(align4) name##4 { T x, y, z, w; };                                            \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                     \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                             \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
WICORE_VECTORS(signed char, char, 2, 4)
WICORE_VECTORS(unsigned char, uchar, 2, 4)
WICORE_VECTORS(short, short, 4, 8)
WICORE_VECTORS(unsigned short, ushort, 4, 8)
WICORE_VECTORS(int, int, 8, 16)
WICORE_VECTORS(unsigned int, uint, 8, 16)
WICORE_VECTORS(float, float, 8, 16)
WICORE_VECTORS(long long, longlong, 16, 16)
WICORE_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef WICORE_VECTORS

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

// --- fibres -------------------------------------------------------------------------------------------------

// The emulation's own code needs no checks of its accesses, and is several times faster without.
#define UNCHECKED __attribute__((no_sanitize("alignment", "bounds")))

namespace emulation {

constexpr int kThreads = 1024, kWarps = 32, kBarriers = 16;
constexpr size_t kStack = (256 << 10) + 65 * 64;  // not a power of two: stacks must not share cache sets
constexpr size_t kShared = 227 << 10, kMargin = 4 << 10;
constexpr uint64_t kCanary = 0x5afe5afe5afe5afeull;
constexpr long kIdleSpins = 20'000'000;

#if defined(__x86_64__) || defined(__aarch64__)
struct Context {
  void* stack;
};
extern "C" __attribute__((visibility("hidden"))) void wicore_switch(Context* from, Context* to);
#if defined(__x86_64__)
asm(R"(
.text
.type wicore_switch, @function
wicore_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size wicore_switch, . - wicore_switch
)");
inline void prepare(Context& context, char* top, void (*entry)()) {
  uint64_t* slots = reinterpret_cast<uint64_t*>(top) - 8;
  std::memset(slots, 0, 64);
  slots[6] = reinterpret_cast<uint64_t>(entry);
  context.stack = slots;
}
#else
asm(R"(
.text
.type wicore_switch, %function
wicore_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  ldr x9, [x1]
  mov sp, x9
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size wicore_switch, . - wicore_switch
)");
inline void prepare(Context& context, char* top, void (*entry)()) {
  uint64_t* slots = reinterpret_cast<uint64_t*>(top) - 20;
  std::memset(slots, 0, 160);
  slots[11] = reinterpret_cast<uint64_t>(entry);
  context.stack = slots;
}
#endif
inline void switch_context(Context* from, Context* to) { wicore_switch(from, to); }
#else
}  // namespace emulation
#include <ucontext.h>
namespace emulation {
struct Context {
  ucontext_t state;
};
inline void prepare(Context& context, char* top, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = top - (kStack - (8 << 10));
  context.state.uc_stack.ss_size = kStack - (8 << 10);
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
inline void switch_context(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
#endif

struct Copy {
  void* target;
  const void* source;
  bool valid;
};

struct Fibre {
  Context context;
  uint3 index;
  int number;
  std::vector<Copy> copies;      // issued by copy_async, not yet done
  std::vector<size_t> groups;    // how many copies there were at each commit
  size_t done_copies, done_groups;
};

using Operation = void (*)(void** args, unsigned mask);

struct Meeting {
  unsigned mask, arrived;
  Operation operation;
  const char* name;
};

struct Warp {
  unsigned ready, alive, exists;
  int meetings;
  Meeting meeting[32];
  void* args[32];
};

struct Barrier {
  int expected, arrived;
  unsigned waiting[kWarps];
};

struct State {
  Fibre fibre[kThreads];
  Fibre* current;
  Warp warp[kWarps];
  unsigned ready_warps;
  Barrier barrier[kBarriers];
  int votes[2];
  unsigned vote_turn[kThreads];
  Context main;
  dim3 grid, block;
  uint3 block_index;
  int threads, alive;
  bool descending;
  long spins;
  size_t shared_bytes;
  char* stacks;
  char* shared;         // dynamic shared memory
  char* static_shared;  // the __shared__ variables
  size_t static_bytes, marker_offset;
  void (*run)();  // the kernel with its arguments
  bool failed;
  bool waited;  // a thread called pdl_wait
  char message[1024];
  pthread_t thread;
  sigjmp_buf escape;
};

State state;

thread_local char marker[16];  // in this library's thread-local block, with all __shared__ variables

// Where this thread has that block.
inline void find_static() {
  char* here = marker;
  asm volatile("" : "+r"(here)::"memory");
  if (!state.static_bytes) {
    auto visit = [](dl_phdr_info* info, size_t, void* place) {
      for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        char* start = static_cast<char*>(info->dlpi_tls_data);
        if (part.p_type != PT_TLS || !start || place < start || place >= start + part.p_memsz) continue;
        state.static_bytes = part.p_memsz;
        state.marker_offset = static_cast<char*>(place) - start;
        return 1;
      }
      return 0;
    };
    dl_iterate_phdr(visit, here);
  }
  state.static_shared = here - state.marker_offset;
}

inline void where(char* text, size_t size) {
  const uint3 &b = state.block_index, &t = state.current->index;
  std::snprintf(text, size, "block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
}

// End the launch with this message; the fibres are left where they stand.
[[noreturn]] __attribute__((format(printf, 1, 2), noinline)) void fail(const char* format, ...) {
  char place[128];
  where(place, sizeof place);
  int used = std::snprintf(state.message, sizeof state.message, "%s: ", place);
  va_list list;
  va_start(list, format);
  std::vsnprintf(state.message + used, sizeof state.message - used, format, list);
  va_end(list);
  state.failed = true;
  switch_context(&state.current->context, &state.main);
  std::abort();
}

__attribute__((noinline)) void fail_stuck() {
  char text[800] = "";
  size_t used = 0;
  auto say = [&](const char* format, auto... values) {
    if (used < sizeof text) used += std::snprintf(text + used, sizeof text - used, format, values...);
  };
  say("the block is stuck, %d of %d threads have ended", state.threads - state.alive, state.threads);
  for (int i = 0; i < kBarriers; ++i)
    if (state.barrier[i].arrived)
      say("; %d of %d wait at barrier %d", state.barrier[i].arrived, state.barrier[i].expected, i);
  for (int w = 0; w < kWarps; ++w)
    for (int i = 0; i < state.warp[w].meetings; ++i) {
      const Meeting& m = state.warp[w].meeting[i];
      say("; warp %d: lanes %08x of %08x wait at %s", w, m.arrived, m.mask, m.name);
    }
  fail("%s", text);
}

inline int first(unsigned set) { return state.descending ? 31 - __builtin_clz(set) : __builtin_ctz(set); }

// The members of `set` that come after `place` in the order of this block.
inline unsigned after(unsigned set, int place) {
  return state.descending ? set & ((1u << place) - 1) : set & ~((2u << place) - 1);
}

UNCHECKED inline void set_ready(int warp, unsigned lanes) {
  state.warp[warp].ready |= lanes;
  state.ready_warps |= 1u << warp;
}

UNCHECKED inline void set_waiting(int warp, int lane) {
  if (!(state.warp[warp].ready &= ~(1u << lane))) state.ready_warps &= ~(1u << warp);
}

// Run another fibre that can run: of the own warp first, or, when `fair`, the next one in the block.
UNCHECKED inline void go_on(bool fair) {
  Fibre* from = state.current;
  int warp = from->number / 32, lane = from->number % 32;
  unsigned own = state.warp[warp].ready, later = after(own, lane);
  if (later || (own && !fair)) {
    lane = first(later ? later : own);
  } else {
    unsigned others = state.ready_warps & ~(1u << warp);
    if (others) {
      unsigned later_warps = after(others, warp);
      warp = first(later_warps ? later_warps : others);
    } else if (!own) {
      fail_stuck();
    }
    lane = first(state.warp[warp].ready);
  }
  Fibre* to = &state.fibre[warp * 32 + lane];
  if (to == from) return;
  state.current = to;
  switch_context(&from->context, &to->context);
}

UNCHECKED inline void wait_for_others() {
  state.spins = 0;
  set_waiting(state.current->number / 32, state.current->number % 32);
  go_on(false);
}

// Wait until every lane of `mask` is here; the last one runs `operation` on the arguments of all.
UNCHECKED inline void meet(unsigned mask, const char* name, Operation operation, void* args) {
  int number = state.current->number, lane = number % 32;
  Warp& warp = state.warp[number / 32];
  if (!(mask >> lane & 1)) fail("%s: lane %d calls it and is not in its mask %08x", name, lane, mask);
  if (mask & ~warp.alive)
    fail("%s: lanes %08x of its mask %08x %s", name, mask & ~warp.alive, mask,
         mask & ~warp.exists ? "do not exist" : "have ended");
  warp.args[lane] = args;
  int i = 0;
  while (i < warp.meetings && (warp.meeting[i].mask != mask || warp.meeting[i].operation != operation ||
                               warp.meeting[i].name != name))
    ++i;
  if (i == warp.meetings) warp.meeting[warp.meetings++] = {mask, 0, operation, name};
  if ((warp.meeting[i].arrived |= 1u << lane) != mask) return wait_for_others();
  warp.meeting[i] = warp.meeting[--warp.meetings];
  if (operation) operation(warp.args, mask);
  set_ready(number / 32, mask);
}

// Named barrier `id` of `count` threads (bar.sync id, count).
UNCHECKED inline void barrier(int id, int count) {
  if (id < 0 || id >= kBarriers) fail("barrier %d: there are 0 to %d", id, kBarriers - 1);
  Barrier& b = state.barrier[id];
  int number = state.current->number;
  if (b.arrived && b.expected != count) fail("barrier %d: %d threads expected, before %d", id, count, b.expected);
  if (count < 1 || count > state.threads) fail("barrier %d: %d threads of a block of %d", id, count, state.threads);
  b.expected = count;
  b.waiting[number / 32] |= 1u << number % 32;
  if (++b.arrived != count) return wait_for_others();
  b.arrived = 0;
  for (int w = 0; w < (state.threads + 31) / 32; ++w) {
    if (b.waiting[w]) set_ready(w, b.waiting[w]);
    b.waiting[w] = 0;
  }
}

// bar.arrive: counts towards the barrier without waiting for it.
inline void barrier_arrive(int id, int count) {
  if (id < 0 || id >= kBarriers) fail("barrier %d: there are 0 to %d", id, kBarriers - 1);
  Barrier& b = state.barrier[id];
  if (b.arrived && b.expected != count) fail("barrier %d: %d threads expected, before %d", id, count, b.expected);
  b.expected = count;
  if (++b.arrived != count) return;
  b.arrived = 0;
  for (int w = 0; w < (state.threads + 31) / 32; ++w) {
    if (b.waiting[w]) set_ready(w, b.waiting[w]);
    b.waiting[w] = 0;
  }
}

// Let the other fibres run: for every turn of a loop that waits for memory to change.
inline void yield() {
  if (++state.spins > kIdleSpins) fail("waits for memory that no other thread changes");
  go_on(true);
}

// A spin-wait came to its end: others may now spin afresh.
inline void progress() { state.spins = 0; }

UNCHECKED void fibre_main() {
  state.run();
  state.spins = 0;
  int number = state.current->number;
  state.warp[number / 32].alive &= ~(1u << number % 32);
  set_waiting(number / 32, number % 32);
  if (--state.alive == 0) switch_context(&state.current->context, &state.main);
  go_on(false);
  std::abort();
}

inline bool is_shared(const void* address, size_t size) {
  const char* p = static_cast<const char*>(address);
  return (p >= state.shared && p + size <= state.shared + state.shared_bytes) ||
         (p >= state.static_shared && p + size <= state.static_shared + state.static_bytes);
}

inline void need_shared(const char* name, const void* address, size_t size) {
  if (reinterpret_cast<uintptr_t>(address) % size) fail("%s: address %p is not aligned to %zu", name, address, size);
  if (is_shared(address, size)) return;
  long offset = static_cast<const char*>(address) - state.shared;
  fail("%s: offset %ld is outside of the block's %zu bytes of shared memory", name, offset, state.shared_bytes);
}

inline void* dynamic_shared() { return state.shared; }

// --- launch ---------------------------------------------------------------------------------------------------

inline void signalled(int number, siginfo_t* info, void*) {
  if (!pthread_equal(pthread_self(), state.thread)) {
    std::signal(number, SIG_DFL);  // not ours: comes again when this returns
    return;
  }
  char place[128];
  where(place, sizeof place);
  if (number == SIGILL || number == SIGBUS || number == SIGTRAP)
    std::snprintf(state.message, sizeof state.message,
                  "%s: a misaligned access, or one past the end of a static array", place);
  else
    std::snprintf(state.message, sizeof state.message,
                  "%s: illegal address %p (or a misaligned 16-byte access, where it is 0)", place, info->si_addr);
  state.failed = true;
  siglongjmp(state.escape, 1);
}

UNCHECKED inline void run_block() {
  std::memset(state.static_shared, 0xff, state.static_bytes);
  std::memset(state.shared, 0xff, state.shared_bytes);
  int count = state.threads;
  state.alive = count;
  state.spins = 0;
  state.ready_warps = 0;
  for (int w = 0; w * 32 < count; ++w) {
    int lanes = count - w * 32 < 32 ? count - w * 32 : 32;
    unsigned all = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    state.warp[w].ready = state.warp[w].alive = state.warp[w].exists = all;
    state.warp[w].meetings = 0;
    state.ready_warps |= 1u << w;
  }
  for (int w = (count + 31) / 32; w < kWarps; ++w) state.warp[w] = Warp{};
  std::memset(state.barrier, 0, sizeof state.barrier);
  std::memset(state.vote_turn, 0, sizeof state.vote_turn);
  for (int i = 0; i < count; ++i) {
    Fibre& f = state.fibre[i];
    f.copies.clear();
    f.groups.clear();
    f.done_copies = f.done_groups = 0;
    char* bottom = state.stacks + i * kStack;
    prepare(f.context, bottom + kStack - 64 - (i * 320) % 4096 / 64 * 64, fibre_main);
  }
  state.current = &state.fibre[state.descending ? count - 1 : 0];
  asm volatile("" ::: "memory");
  switch_context(&state.main, &state.current->context);
  if (state.failed) return;
  for (int i = 0; i < count; ++i)
    if (*reinterpret_cast<uint64_t*>(state.stacks + i * kStack) != kCanary) {
      state.current = &state.fibre[i];
      state.failed = true;
      std::snprintf(state.message, sizeof state.message, "thread %d needs more than %zu KB of stack", i, kStack >> 10);
      return;
    }
  for (size_t i = 0; i < kMargin; ++i)
    if (state.shared[state.shared_bytes + i] != '\xff') {
      const uint3& b = state.block_index;
      std::snprintf(state.message, sizeof state.message,
                    "block (%u, %u, %u): wrote to offset %zu, past the block's %zu bytes of shared memory", b.x, b.y,
                    b.z, state.shared_bytes + i, state.shared_bytes);
      std::memset(state.shared + state.shared_bytes, 0xff, kMargin);
      state.failed = true;
      return;
    }
}

inline bool set_up() {
  if (state.stacks) return true;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, access = PROT_READ | PROT_WRITE;
  void* stacks = mmap(nullptr, kThreads * kStack, access, flags, -1, 0);
  // Shared memory has a megabyte that nobody may touch on either side.
  size_t page = 64 << 10, guard = 1 << 20, room = (kShared + kMargin + page - 1) / page * page;
  void* shared = mmap(nullptr, room + 2 * guard + page, PROT_NONE, flags, -1, 0);
  if (stacks == MAP_FAILED || shared == MAP_FAILED) return false;
  state.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared) + guard + page - 1) / page * page);
  if (mprotect(state.shared, room, access)) return false;
  std::memset(state.shared, 0xff, kShared + kMargin);
  state.stacks = static_cast<char*>(stacks);
  for (int i = 0; i < kThreads; ++i) *reinterpret_cast<uint64_t*>(state.stacks + i * kStack) = kCanary;
  return true;
}

// Run every block. order: 0 = ascending, 1 = descending, 2 + n = descending where block + n is odd.
inline int launch(const unsigned* grid, const unsigned* block, size_t shared_bytes, int order, int dependent,
                  char* message, size_t message_bytes) {
  if (!set_up()) return std::snprintf(message, message_bytes, "no memory for stacks"), 1;
  state.grid = {grid[0], grid[1], grid[2]};
  state.block = {block[0], block[1], block[2]};
  state.threads = static_cast<int>(block[0] * block[1] * block[2]);
  state.shared_bytes = shared_bytes;
  state.failed = state.waited = false;
  state.thread = pthread_self();
  find_static();
  std::memset(state.shared + shared_bytes, 0xff, kMargin);
  for (int i = 0; i < state.threads; ++i) {
    unsigned n = static_cast<unsigned>(i);
    state.fibre[i].number = i;
    state.fibre[i].index = {n % block[0], n / block[0] % block[1], n / block[0] / block[1]};
  }
  static char signal_stack[64 << 10];
  stack_t stack{}, old_stack{};
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{}, old[4];
  const int signals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  action.sa_sigaction = signalled;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &old[i]);
  if (sigsetjmp(state.escape, 1) == 0) {
    unsigned number = 0;
    for (unsigned z = 0; z < grid[2] && !state.failed; ++z)
      for (unsigned y = 0; y < grid[1] && !state.failed; ++y)
        for (unsigned x = 0; x < grid[0] && !state.failed; ++x, ++number) {
          state.block_index = {x, y, z};
          state.descending = order == 1 || (order >= 2 && (number + order) % 2);
          run_block();
        }
  }
  for (int i = 0; i < 4; ++i) sigaction(signals[i], &old[i], nullptr);
  sigaltstack(&old_stack, nullptr);
  if (!state.failed && dependent && !state.waited) {
    state.failed = true;
    std::snprintf(state.message, sizeof state.message, "launched as dependent, and no thread calls pdl_wait");
  }
  if (state.failed) std::snprintf(message, message_bytes, "%s", state.message);
  return state.failed;
}

// A kernel with its arguments, from the addresses of their values.
template <class... P>
struct Kernel {
  using Values = std::tuple<std::remove_cv_t<std::remove_reference_t<P>>*...>;
  static inline void (*function)(P...);
  static inline Values values;

  template <size_t... I>
  static void call(std::index_sequence<I...>) {
    function(*std::get<I>(values)...);
  }
  static void run() { call(std::index_sequence_for<P...>{}); }

  template <size_t... I>
  static void take(void** args, std::index_sequence<I...>) {
    values = Values{static_cast<std::tuple_element_t<I, Values>>(args[I])...};
  }
};

template <class... P>
int launch_kernel(void (*function)(P...), void** args, const unsigned* grid, const unsigned* block,
                  size_t shared_bytes, int order, int dependent, char* message, size_t message_bytes) {
  Kernel<P...>::function = function;
  Kernel<P...>::take(args, std::index_sequence_for<P...>{});
  state.run = Kernel<P...>::run;
  return launch(grid, block, shared_bytes, order, dependent, message, message_bytes);
}

// The sizes of a kernel's parameters; returns how many there are.
template <class... P>
int parameter_sizes(void (*)(P...), int* sizes) {
  int i = 0;
  ((sizes[i++] = sizeof(P)), ...);
  return i;
}

}  // namespace emulation

#define threadIdx (::emulation::state.current->index)
#define blockIdx (::emulation::state.block_index)
#define blockDim (::emulation::state.block)
#define gridDim (::emulation::state.grid)
#define warpSize 32

#define SHARED_MEMORY(T, name) T* name = reinterpret_cast<T*>(::emulation::dynamic_shared())

inline void emulated_yield() { emulation::yield(); }
inline void emulated_progress() { emulation::progress(); }

// --- half -----------------------------------------------------------------------------------------------------

struct __align__(2) half {
  uint16_t bits;
};
struct __align__(4) half2 {
  half x, y;
};
using __half = half;
using __half2 = half2;

namespace emulation {

template <class To, class From>
inline To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

#ifdef __F16C__
typedef short short8 __attribute__((vector_size(16)));
typedef float float4_ __attribute__((vector_size(16)));
inline float to_float(uint16_t bits) {
  float4_ v = __builtin_ia32_vcvtph2ps(short8{static_cast<short>(bits)});
  return v[0];
}
inline uint16_t to_half(float value) {
  return static_cast<uint16_t>(__builtin_ia32_vcvtps2ph(float4_{value}, 0)[0]);
}
#else
inline float to_float(uint16_t bits) {
  uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00) return same_bits<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  float magnitude = same_bits<float>(rest << 13) * 0x1p112f;  // subnormals too: the product is exact
  return same_bits<float>(sign | same_bits<uint32_t>(magnitude));
}
inline uint16_t to_half(float value) {
  uint32_t bits = same_bits<uint32_t>(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
  if (rest >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u)  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even
    return static_cast<uint16_t>(sign | (same_bits<uint32_t>(same_bits<float>(rest) + 0.5f) - 0x3f000000u));
  return static_cast<uint16_t>(sign | ((rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13));
}
#endif

}  // namespace emulation

inline float __half2float(half h) { return emulation::to_float(h.bits); }
inline half __float2half_rn(float f) { return {emulation::to_half(f)}; }
inline half __float2half(float f) { return __float2half_rn(f); }
inline half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline half2 __float2half2_rn(float f) { return __floats2half2_rn(f, f); }
inline float2 __half22float2(half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float __low2float(half2 h) { return __half2float(h.x); }
inline float __high2float(half2 h) { return __half2float(h.y); }
inline half __low2half(half2 h) { return h.x; }
inline half __high2half(half2 h) { return h.y; }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 __half2half2(half h) { return {h, h}; }
inline unsigned short __half_as_ushort(half h) { return h.bits; }
inline half __ushort_as_half(unsigned short bits) { return {bits}; }
inline half2 __hmul2(half2 a, half2 b) {
  return __floats2half2_rn(__half2float(a.x) * __half2float(b.x), __half2float(a.y) * __half2float(b.y));
}
inline half2 __hadd2(half2 a, half2 b) {
  return __floats2half2_rn(__half2float(a.x) + __half2float(b.x), __half2float(a.y) + __half2float(b.y));
}
inline half2 __hsub2(half2 a, half2 b) {
  return __floats2half2_rn(__half2float(a.x) - __half2float(b.x), __half2float(a.y) - __half2float(b.y));
}
inline half2 __hfma2(half2 a, half2 b, half2 c) {  // the product of halves is exact in float; double keeps the sum
  auto one = [](half p, half q, half r) {
    return __float2half_rn(static_cast<float>(static_cast<double>(__half2float(p)) * __half2float(q) + __half2float(r)));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}

// --- arithmetic -----------------------------------------------------------------------------------------------

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
using std::isfinite;
using std::isinf;
using std::isnan;

inline float rsqrtf(float v) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v))); }
inline float __saturatef(float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __frsqrt_rn(float v) { return rsqrtf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __exp2f(float v) { return exp2f(v); }
inline float __logf(float v) { return logf(v); }
inline int __float2int_rn(float v) { return static_cast<int>(rintf(v)); }
inline int __float2int_rd(float v) { return static_cast<int>(floorf(v)); }
inline int __float2int_ru(float v) { return static_cast<int>(ceilf(v)); }
inline int __float2int_rz(float v) { return static_cast<int>(v); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return emulation::same_bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulation::same_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return emulation::same_bits<float>(v); }
inline float __int_as_float(int v) { return emulation::same_bits<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __ffsll(unsigned long long v) { return __builtin_ffsll(static_cast<long long>(v)); }
inline int __clz(unsigned v) { return v ? __builtin_clz(v) : 32; }
inline int __clzll(unsigned long long v) { return v ? __builtin_clzll(v) : 64; }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned s = selector >> (4 * i) & 15u, byte = static_cast<unsigned>(bytes >> (8 * (s & 7u))) & 255u;
    result |= (s & 8u ? (byte & 128u ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<int>(static_cast<int8_t>(a >> (8 * i))) * static_cast<int8_t>(b >> (8 * i));
  return c;
}

template <class T>
inline T __ldg(const T* address) { return *address; }
template <class T>
inline T __ldcg(const T* address) { return *address; }
template <class T>
inline T __ldcs(const T* address) { return *address; }
template <class T>
inline void __stcg(T* address, T value) { *address = value; }
template <class T>
inline void __stcs(T* address, T value) { *address = value; }

// --- barriers, shuffles, votes ----------------------------------------------------------------------------------

inline void __syncthreads() { emulation::barrier(0, emulation::state.threads); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::meet(mask, "__syncwarp", nullptr, nullptr); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { emulation::yield(); }
inline void __trap() { emulation::fail("__trap"); }

namespace emulation {

struct Shuffle {
  uint64_t value;
  int source;
};

UNCHECKED inline void shuffle(void** args, unsigned mask) {
  uint64_t values[32];
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    values[lane] = static_cast<Shuffle*>(args[lane])->value;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Shuffle& s = *static_cast<Shuffle*>(args[__builtin_ctz(rest)]);
    if (!(mask >> s.source & 1)) fail("a shuffle reads lane %d, which is not in its mask %08x", s.source, mask);
    s.value = values[s.source];
  }
}

template <class T>
inline T exchange(unsigned mask, const char* name, T value, int source) {
  static_assert(sizeof(T) <= 8, "a shuffle takes up to 8 bytes");
  Shuffle s{0, source};
  std::memcpy(&s.value, &value, sizeof value);
  meet(mask, name, shuffle, &s);
  std::memcpy(&value, &s.value, sizeof value);
  return value;
}

inline int this_lane() { return state.current->number % 32; }

struct Vote {
  unsigned value;
};

UNCHECKED inline void ballot(void** args, unsigned mask) {
  unsigned set = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    set |= (static_cast<Vote*>(args[lane])->value ? 1u : 0u) << lane;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) static_cast<Vote*>(args[__builtin_ctz(rest)])->value = set;
}

inline unsigned vote(unsigned mask, const char* name, bool predicate) {
  Vote v{predicate};
  meet(mask, name, ballot, &v);
  return v.value;
}

template <class T, T (*combine)(T, T)>
UNCHECKED inline void reduction(void** args, unsigned mask) {
  T total{};
  bool begun = false;
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    T value = *static_cast<T*>(args[__builtin_ctz(rest)]);
    total = begun ? combine(total, value) : value;
    begun = true;
  }
  for (unsigned rest = mask; rest; rest &= rest - 1) *static_cast<T*>(args[__builtin_ctz(rest)]) = total;
}

template <class T>
T add(T a, T b) { return a + b; }
template <class T>
T smaller(T a, T b) { return b < a ? b : a; }
template <class T>
T larger(T a, T b) { return a < b ? b : a; }
template <class T>
T both(T a, T b) { return a & b; }
template <class T>
T either(T a, T b) { return a | b; }

}  // namespace emulation

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  int base = emulation::this_lane() & ~(width - 1);
  return emulation::exchange(mask, "__shfl_sync", value, base + (source & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  int lane = emulation::this_lane(), source = lane ^ lanes, end = (lane & ~(width - 1)) + width;
  return emulation::exchange(mask, "__shfl_xor_sync", value, source < end ? source : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  int lane = emulation::this_lane(), source = lane + static_cast<int>(lanes);
  return emulation::exchange(mask, "__shfl_down_sync", value, (lane & (width - 1)) + (int)lanes < width ? source : lane);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  int lane = emulation::this_lane();
  return emulation::exchange(mask, "__shfl_up_sync", value,
                             (lane & (width - 1)) >= (int)lanes ? lane - static_cast<int>(lanes) : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool p) { return emulation::vote(mask, "__ballot_sync", p); }
inline int __any_sync(unsigned mask, bool p) { return emulation::vote(mask, "__any_sync", p) != 0; }
inline int __all_sync(unsigned mask, bool p) { return emulation::vote(mask, "__all_sync", p) == mask; }

#define WICORE_REDUCTION(name, T, combine)                                                             \
  inline T name(unsigned mask, T value) {                                                              \
    emulation::meet(mask, #name, emulation::reduction<T, emulation::combine<T>>, &value);              \
    return value;                                                                                      \
  }
WICORE_REDUCTION(__reduce_add_sync, unsigned, add)
WICORE_REDUCTION(__reduce_add_sync, int, add)
WICORE_REDUCTION(__reduce_min_sync, unsigned, smaller)
WICORE_REDUCTION(__reduce_min_sync, int, smaller)
WICORE_REDUCTION(__reduce_max_sync, unsigned, larger)
WICORE_REDUCTION(__reduce_max_sync, int, larger)
WICORE_REDUCTION(__reduce_and_sync, unsigned, both)
WICORE_REDUCTION(__reduce_or_sync, unsigned, either)
#undef WICORE_REDUCTION

namespace emulation {
// Two counts, as a fast thread may be at the next vote before a slow one has read the last.
inline int count_votes(bool predicate) {
  int& count = state.votes[state.vote_turn[state.current->number]++ & 1];
  if (state.barrier[0].arrived == 0) count = 0;
  count += predicate;
  barrier(0, state.threads);
  return count;
}
}  // namespace emulation
inline int __syncthreads_count(bool p) { return emulation::count_votes(p); }
inline int __syncthreads_or(bool p) { return emulation::count_votes(p) != 0; }
inline int __syncthreads_and(bool p) { return emulation::count_votes(p) == emulation::state.threads; }

// --- atomics ----------------------------------------------------------------------------------------------------

namespace emulation {
template <class T>
struct Given {
  using type = T;
};
template <class T>
using given = typename Given<T>::type;  // not deduced
template <class T, class F>
inline T change(T* address, F next) {
  T old = *address;
  *address = next(old);
  return old;
}
}  // namespace emulation

template <class T>
inline T atomicAdd(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return old + v; }); }
template <class T>
inline T atomicSub(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return old - v; }); }
template <class T>
inline T atomicMax(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return old < v ? v : old; }); }
template <class T>
inline T atomicMin(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return v < old ? v : old; }); }
template <class T>
inline T atomicExch(T* p, emulation::given<T> v) { return emulation::change(p, [=](T) { return v; }); }
template <class T>
inline T atomicAnd(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return old & v; }); }
template <class T>
inline T atomicOr(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return old | v; }); }
template <class T>
inline T atomicXor(T* p, emulation::given<T> v) { return emulation::change(p, [=](T old) { return old ^ v; }); }
template <class T>
inline T atomicCAS(T* p, emulation::given<T> compare, emulation::given<T> v) {
  return emulation::change(p, [=](T old) { return old == compare ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return emulation::change(p, [=](unsigned old) { return old >= limit ? 0u : old + 1u; });
}

// --- twins of the wrappers in common.cuh ------------------------------------------------------------------------

inline void pdl_wait() { emulation::state.waited = true; }
inline void pdl_launch() {}

namespace emulation {

inline void need_aligned(const char* name, const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) fail("%s: address %p is not aligned to 16", name, address);
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

typedef float float8 __attribute__((vector_size(32)));

inline float8 to_floats(const uint16_t* bits) {
#ifdef __F16C__
  short8 v;
  std::memcpy(&v, bits, sizeof v);
  return __builtin_ia32_vcvtph2ps256(v);
#else
  float8 v;
  for (int i = 0; i < 8; ++i) v[i] = to_float(bits[i]);
  return v;
#endif
}

UNCHECKED inline void mma(void** args, unsigned) {
  uint16_t a[16][16], b[16][8];
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& m = *static_cast<Mma*>(args[lane]);
    int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) std::memcpy(&a[g + i % 2 * 8][t + i / 2 * 8], &m.a[i], 4);
    for (int i = 0; i < 2; ++i) {
      b[t + i * 8][g] = static_cast<uint16_t>(m.b[i]);
      b[t + i * 8 + 1][g] = static_cast<uint16_t>(m.b[i] >> 16);
    }
    std::memcpy(&d[g][t], m.d, 8);
    std::memcpy(&d[g + 8][t], m.d + 2, 8);
  }
  float8 rows[16];
  for (int k = 0; k < 16; ++k) rows[k] = to_floats(b[k]);
  for (int row = 0; row < 16; ++row) {
    float8 sums, factors[2] = {to_floats(a[row]), to_floats(a[row] + 8)};
    std::memcpy(&sums, d[row], sizeof sums);
    for (int k = 0; k < 16; ++k) sums += factors[k / 8][k % 8] * rows[k];
    std::memcpy(d[row], &sums, sizeof sums);
  }
  for (int lane = 0; lane < 32; ++lane) {
    Mma& m = *static_cast<Mma*>(args[lane]);
    int g = lane / 4, t = lane % 4 * 2;
    std::memcpy(m.d, &d[g][t], 8);
    std::memcpy(m.d + 2, &d[g + 8][t], 8);
  }
}

struct Matrices {
  uint32_t* result;
  const void* row;
};

template <bool kTransposed>
UNCHECKED inline void load_matrices(void** args, unsigned) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < 32; ++lane)
    std::memcpy(matrix[lane / 8][lane % 8], static_cast<Matrices*>(args[lane])->row, 16);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      int r = lane / 4, c = lane % 4 * 2;
      uint32_t low = kTransposed ? matrix[i][c][r] : matrix[i][r][c];
      uint32_t high = kTransposed ? matrix[i][c + 1][r] : matrix[i][r][c + 1];
      static_cast<Matrices*>(args[lane])->result[i] = low | high << 16;
    }
}

}  // namespace emulation

inline uint4 load_once(const void* address) {
  emulation::need_aligned("load_once", address);
  uint4 v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Mma m{d, a, b};
  emulation::meet(0xffffffffu, "mma_16816", emulation::mma, &m);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::need_shared("ldmatrix_x4", row, 16);
  emulation::Matrices m{r, row};
  emulation::meet(0xffffffffu, "ldmatrix_x4", emulation::load_matrices<false>, &m);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulation::need_shared("ldmatrix_x4_trans", row, 16);
  emulation::Matrices m{r, row};
  emulation::meet(0xffffffffu, "ldmatrix_x4_trans", emulation::load_matrices<true>, &m);
}

// The copy is done only when it is waited for; until then the target is NaN.
inline void copy_async(void* shared, const void* global, bool valid = true) {
  emulation::need_shared("copy_async", shared, 16);
  if (valid) emulation::need_aligned("copy_async", global);
  std::memset(shared, 0xff, 16);
  emulation::state.current->copies.push_back({shared, global, valid});
}

template <int BYTES>
inline void copy_async_ahead(void* shared, const void* global, bool valid = true) {
  copy_async(shared, global, valid);
}

// Asking for memory that there is not is no error.
inline void prefetch_l2(const void*) {}

inline void copy_commit() {
  emulation::Fibre& f = *emulation::state.current;
  f.groups.push_back(f.copies.size());
}

template <int N>
inline void copy_wait() {
  emulation::Fibre& f = *emulation::state.current;
  while (f.groups.size() - f.done_groups > N)
    for (size_t end = f.groups[f.done_groups++]; f.done_copies < end; ++f.done_copies) {
      const emulation::Copy& c = f.copies[f.done_copies];
      c.valid ? std::memcpy(c.target, c.source, 16) : std::memset(c.target, 0, 16);
    }
  if (f.done_copies == f.copies.size() && f.done_groups == f.groups.size()) {
    f.copies.clear();
    f.groups.clear();
    f.done_copies = f.done_groups = 0;
  }
}

// What cuTensorMapEncodeTiled makes, in plain fields: a matrix of which boxes are copied to shared memory.
struct alignas(64) CUtensorMap {
  uint64_t address, rows, columns, row_stride_bytes;
  uint32_t box_rows, box_columns, element_bytes, swizzle_bytes;  // swizzle: 0, 32, 64 or 128
  char unused[80];
};
static_assert(sizeof(CUtensorMap) == 128);
