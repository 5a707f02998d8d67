// Fills A tiles with pixels of NHWC activations, prologue applied.
#pragma once

#include "cpu/epilogue.h"

namespace fastcnn {
namespace {

// The input pixel that an output pixel of a strided pointwise convolution reads.
inline int64_t input_pixel(const PixelGrid& g, int64_t pixel) {
  if (g.is_dense()) return pixel;
  const int64_t q = pixel % g.out_w, rest = pixel / g.out_w, p = rest % g.out_h, image = rest / g.out_h;
  return (image * g.in_h + p * g.stride_h) * g.in_w + q * g.stride_w;
}

// Rows of the tile are pixels [first, first + count) with their k channels.
template <class T, class Words>
void fill_rows(const PixelGrid& grid, const Activations& x, const ScaleShiftAct& prologue, int64_t k,
               int64_t first, int64_t count, const TileWriter<Words>& a) {
  with_prologue(prologue, [&](const auto& pre) {
    for (int64_t row = 0; row < count; ++row) {
      const T* src = static_cast<const T*>(x.data) + input_pixel(grid, first + row) * x.ld;
      a.fill_row(row, k, [&](int64_t c, int64_t n) { return pre(load_upto(src + c, n), c, n); });
    }
  });
}

}  // namespace
}  // namespace fastcnn
