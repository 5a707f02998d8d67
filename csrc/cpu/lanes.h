// Loops over channels by whole vectors, then a masked rest.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace fastcnn {
namespace {

struct AllLanes {
  static constexpr int count = kLanes;

  template <class T>
  V get(const T* p) const {
    return load(p);
  }
  template <class T>
  void put(T* p, V v) const {
    store(p, v);
  }
};

struct SomeLanes {
  int count;

  template <class T>
  V get(const T* p) const {
    return load(p, count);
  }
  template <class T>
  void put(T* p, V v) const {
    store(p, v, count);
  }
};

// Stores past the caches: only for outputs that no cache would hold until they are read, and never followed
// by a read in the same unit of work. finish_streaming() ends the unit.
struct StreamedLanes : AllLanes {
#if FASTCNN_ISA_LEVEL >= 2
  void put(float* p, V v) const { _mm512_stream_ps(p, v); }
  using AllLanes::put;
#endif
};

// Whole 64-byte lines, and more bytes than L3 holds next to the operands. Where the output does fit, stores
// that go past the cache cost up to ten times as much, since its lines are usually there from the last call.
constexpr int64_t kStreamedBytes = 16 << 20;

template <class T>
bool can_stream(const T* out, int64_t ld, int64_t bytes) {
  return FASTCNN_ISA_LEVEL >= 2 && sizeof(T) == 4 && bytes >= kStreamedBytes && ld % 16 == 0 &&
         reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

inline void finish_streaming() {
#if FASTCNN_ISA_LEVEL >= 2
  _mm_sfence();
#endif
}

// f(c, lanes) for c = 0, kLanes, ... below count.
template <bool kStreamed = false, class F>
inline void for_lanes(int64_t count, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) f(c, std::conditional_t<kStreamed, StreamedLanes, AllLanes>{});
  if (c < count) f(c, SomeLanes{int(count - c)});
}

// f(first, integral_constant<int, n>) for n neighbouring pixels at a time: 4, then single ones.
template <class F>
inline void for_pixels(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) f(i, std::integral_constant<int, 4>());
  for (; i < count; ++i) f(i, std::integral_constant<int, 1>());
}

// f(integral_constant<int, act>): a loop that knows its activation when compiling has no switch inside.
template <class F>
inline void with_activation(int act, const F& f) {
  switch (act) {
    case kRelu:
      return f(std::integral_constant<int, kRelu>());
    case kRelu6:
      return f(std::integral_constant<int, kRelu6>());
    case kSilu:
      return f(std::integral_constant<int, kSilu>());
    case kHardswish:
      return f(std::integral_constant<int, kHardswish>());
    default:
      return f(std::integral_constant<int, kNone>());
  }
}

}  // namespace
}  // namespace fastcnn
