// Which input positions a pooling window covers along an axis, and which windows cover an input position.
#pragma once

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
