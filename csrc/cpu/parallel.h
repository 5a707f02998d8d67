// Work shared among torch's own OpenMP threads, and aligned scratch memory.
//
// In an anonymous namespace: most sources that use it are compiled per instruction set.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastcnn {
namespace {

// f(unit) for every unit in [0, units). Which thread runs a unit is open; what a unit computes must not
// depend on it.
template <class F>
void parallel_for(int64_t units, const F& f) {
  if (units <= 1 || omp_get_max_threads() == 1 || omp_in_parallel()) {
    for (int64_t unit = 0; unit < units; ++unit) f(unit);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t unit = 0; unit < units; ++unit) f(unit);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// `count` elements on a 64-byte boundary, freed with the object.
template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~AlignedBuffer() { std::free(data_); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }

 private:
  T* data_;
};

// One part of a buffer per thread, each grown on demand and kept for the thread's next unit of work.
inline float* thread_scratch(size_t floats) {
  struct Arena {
    float* data = nullptr;
    size_t size = 0;
    ~Arena() { std::free(data); }
  };
  thread_local Arena arena;
  if (arena.size < floats) {
    std::free(arena.data);
    arena.size = (floats + 1023) / 1024 * 1024;
    arena.data = static_cast<float*>(std::aligned_alloc(64, arena.size * sizeof(float)));
    if (!arena.data) {
      arena.size = 0;
      throw std::bad_alloc();
    }
  }
  return arena.data;
}

}  // namespace
}  // namespace fastcnn
