// A stand-in for the CUDA execution model, for tests only: compiles csrc/cuda/*.cu with a C++ compiler.
//
// Blocks run one after another. A block's threads are fibers, switched at barriers and warp
// collectives, in ascending or in descending order (`schedule`): a race that a missing
// barrier leaves shows as a difference between the two. Dynamic shared memory is one exact
// heap block per CUDA block, filled with NaN, so that a sanitizer sees what leaves it.
// Asynchronous copies happen when they are waited for, so that a missing wait shows too.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __launch_bounds__(...)
#define FASTCNN_DEVICE inline
#define FASTCNN_HOST_DEVICE inline

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastcnn::cuda::on_cpu {

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state;
  std::vector<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
  std::vector<Copy> open;
};

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 * 1024;

// What the lanes of a warp show each other in a collective.
struct Exchange {
  uint32_t words[kWarp][6];
  float floats[kWarp][4];
  const void* pointers[kWarp];
};

struct Block {
  dim3 thread{0}, block{0}, threads{1}, grid{1};
  char* shared = nullptr;
  int current = 0;
  bool descending = false;
  std::vector<Fiber> fibers;
  std::vector<Exchange> exchanges;
  std::function<void()> body;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
};

inline Block& running() {
  static Block block;
  return block;
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

// Sanitizers follow the switch from stack to stack.
inline void switch_started(void** save, const void* bottom, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
}
inline void switch_finished(void* fake, const void** bottom, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, bytes);
#endif
}

inline void yield_as(State state) {
  Block& b = running();
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  switch_started(state == State::kDone ? nullptr : &fiber.fake_stack, b.scheduler_stack,
                 b.scheduler_stack_bytes);
  swapcontext(&fiber.context, &b.scheduler);
  switch_finished(fiber.fake_stack, &b.scheduler_stack, &b.scheduler_stack_bytes);
}

inline void fiber_main() {
  Block& b = running();
  switch_finished(nullptr, &b.scheduler_stack, &b.scheduler_stack_bytes);
  b.body();
  yield_as(State::kDone);
}

inline void resume(Block& b, int index) {
  Fiber& fiber = b.fibers[index];
  b.current = index;
  b.thread.x = index;
  switch_started(&b.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&b.scheduler, &fiber.context);
  switch_finished(b.scheduler_fake_stack, nullptr, nullptr);
}

// Lets a barrier go that every fiber of [first, last) has reached. Returns whether any fiber can run.
inline bool release(Block& b, int first, int last, State barrier) {
  int waiting = 0;
  for (int i = first; i < last; ++i) waiting += b.fibers[i].state == barrier;
  if (waiting != last - first) return false;
  for (int i = first; i < last; ++i) b.fibers[i].state = State::kReady;
  return true;
}

inline void run_block(Block& b) {
  const int count = int(b.threads.x);
  for (Fiber& fiber : b.fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kReady;
    fiber.fake_stack = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (int done = 0; done < count;) {
    bool progress = false;
    for (int i = 0; i < count; ++i) {
      const int index = b.descending ? count - 1 - i : i;
      if (b.fibers[index].state != State::kReady) continue;
      resume(b, index);
      progress = true;
      done += b.fibers[index].state == State::kDone;
    }
    for (int warp = 0; warp < count; warp += kWarp) {
      progress |= release(b, warp, std::min(warp + kWarp, count), State::kAtWarpBarrier);
    }
    progress |= release(b, 0, count, State::kAtBlockBarrier);
    if (!progress && done < count) fail("a barrier that not every thread reaches");
  }
  for (Fiber& fiber : b.fibers) {
    if (!fiber.open.empty()) fail("an asynchronous copy that is never committed");
    for (const auto& group : fiber.groups) {
      if (!group.empty()) fail("an asynchronous copy that is never waited for");
    }
    fiber.groups.clear();
  }
}

inline Exchange& exchange() { return running().exchanges[running().current / kWarp]; }
inline int lane() { return running().current % kWarp; }
inline void warp_barrier() { yield_as(State::kAtWarpBarrier); }

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint16_t float_to_bfloat16(float v) {
  const uint32_t bits = bits_of(v);
  if (v != v) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t float_to_half(float v) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

}  // namespace fastcnn::cuda::on_cpu

#define threadIdx (fastcnn::cuda::on_cpu::running().thread)
#define blockIdx (fastcnn::cuda::on_cpu::running().block)
#define blockDim (fastcnn::cuda::on_cpu::running().threads)
#define gridDim (fastcnn::cuda::on_cpu::running().grid)

inline void __syncthreads() {
  fastcnn::cuda::on_cpu::yield_as(fastcnn::cuda::on_cpu::State::kAtBlockBarrier);
}

inline float __shfl_xor_sync(unsigned mask, float v, int offset) {
  namespace on_cpu = fastcnn::cuda::on_cpu;
  if (mask != 0xffffffffu) on_cpu::fail("a shuffle of part of a warp");
  on_cpu::Exchange& e = on_cpu::exchange();
  e.floats[on_cpu::lane()][0] = v;
  on_cpu::warp_barrier();
  const float other = e.floats[on_cpu::lane() ^ offset][0];
  on_cpu::warp_barrier();
  return other;
}

inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint32_t __float_as_uint(float v) { return fastcnn::cuda::on_cpu::bits_of(v); }
inline float __uint_as_float(uint32_t v) { return fastcnn::cuda::on_cpu::float_of(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
using std::min;

namespace fastcnn::cuda {

inline char* dynamic_shared() { return on_cpu::running().shared; }
inline int opaque(int v) { return v; }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            void*, const Arguments&... arguments) {
  if (threads > 1024 || shared_bytes > 227 * 1024 || grid.y > 65535) throw std::runtime_error(name);
  on_cpu::Block& b = on_cpu::running();
  b.threads = dim3(threads);
  b.grid = grid;
  b.fibers.resize(threads);
  b.exchanges.resize((threads + on_cpu::kWarp - 1) / on_cpu::kWarp);
  for (on_cpu::Fiber& fiber : b.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[on_cpu::kStackBytes]);
  }
  b.body = [&] { kernel(arguments...); };
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      b.block = dim3(x, y);
      void* shared = nullptr;
      if (posix_memalign(&shared, 16, std::max<size_t>(shared_bytes, 16)) != 0) on_cpu::fail("out of memory");
      std::memset(shared, 0xff, shared_bytes);
      b.shared = static_cast<char*>(shared);
      on_cpu::run_block(b);
      std::free(shared);
    }
  }
}

inline void copy_async(void* shared, const void* global, bool valid) {
  on_cpu::Block& b = on_cpu::running();
  b.fibers[b.current].open.push_back({shared, global, valid});
}
inline void copy_async_commit() {
  on_cpu::Block& b = on_cpu::running();
  on_cpu::Fiber& fiber = b.fibers[b.current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int Pending>
void copy_async_wait() {
  on_cpu::Block& b = on_cpu::running();
  auto& groups = b.fibers[b.current].groups;
  const size_t complete = groups.size() > size_t(Pending) ? groups.size() - Pending : 0;
  for (size_t i = 0; i < complete; ++i) {
    for (const on_cpu::Copy& copy : groups[i]) {
      if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      if (!copy.valid) std::memset(copy.to, 0, 16);
    }
  }
  groups.erase(groups.begin(), groups.begin() + long(complete));
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  on_cpu::Exchange& e = on_cpu::exchange();
  const int lane = on_cpu::lane();
  e.pointers[lane] = row;
  on_cpu::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const char* source = static_cast<const char*>(e.pointers[8 * i + lane / 4]);
    std::memcpy(&r[i], source + lane % 4 * 4, 4);
  }
  on_cpu::warp_barrier();
}

// mma.m16n8k16: lane l has A at rows l / 4 (+ 8) and columns 2 (l % 4) + {0, 1} (+ 8), B at column l / 4.
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, T) {
  on_cpu::Exchange& e = on_cpu::exchange();
  const int lane = on_cpu::lane();
  std::copy(a, a + 4, e.words[lane]);
  std::copy(b, b + 2, e.words[lane] + 4);
  on_cpu::warp_barrier();
  const auto value = [](uint32_t word, int half) { return to_float(T{uint16_t(word >> 16 * half)}); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int quad = k % 8 / 2;
      const uint32_t left = e.words[row % 8 * 4 + quad][row / 8 + k / 8 * 2];
      const uint32_t right = e.words[column * 4 + quad][4 + k / 8];
      sum += double(value(left, k % 2)) * value(right, k % 2);
    }
    d[i] += float(sum);
  }
  on_cpu::warp_barrier();
}

}  // namespace fastcnn::cuda
