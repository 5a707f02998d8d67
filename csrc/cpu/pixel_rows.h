// Fills A tiles with pixels of NHWC activations, prologue applied.
#pragma once

#include "cpu/prologue.h"

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
    fill_tile(
        a, count, k, [&](int64_t row) { return input_pixel(grid, first + row); },
        [&](int64_t c) { return input_column<T>(x, pre, c, k); });
  });
}

}  // namespace
}  // namespace fastcnn
