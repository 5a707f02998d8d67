// Which input positions a pooling window covers along an axis, and which windows cover an input position.
#pragma once

#include <type_traits>

#include "cpu/parallel.h"

namespace fastcnn {
namespace {

struct Window {
  int64_t first, last;

  Window(int64_t out, int kernel, int stride, int pad, int64_t size) {
    first = out * stride - pad;
    last = first + kernel < size ? first + kernel : size;
    if (first < 0) first = 0;
  }
  int64_t count() const { return last - first; }
};

// f(count), as a constant for the windows that networks have.
template <class F>
[[gnu::always_inline]] inline void with_window(int64_t count, const F& f) {
  if (count == 3) return f(std::integral_constant<int64_t, 3>());
  if (count == 2) return f(std::integral_constant<int64_t, 2>());
  f(count);
}

// Output positions whose windows reach an input position.
struct Reach {
  int64_t first, last;

  Reach(int64_t in, int kernel, int stride, int pad, int64_t size) {
    const int64_t begin = in + pad - kernel + 1;
    first = begin > 0 ? ceil_div(begin, stride) : 0;
    last = (in + pad) / stride + 1;
    if (last > size) last = size;
  }
};

}  // namespace
}  // namespace fastcnn
