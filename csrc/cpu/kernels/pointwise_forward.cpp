// Pointwise convolution forward: A tiles of pixels with the prologue applied, times packed weights, with an
// epilogue.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/pixel_rows.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

// Pixels that AMX reads where they lie, which takes half the time of copying them for 64 outputs: whole tiles
// of channels and of pixels, since nothing beyond them may be read. (Products of floats gain 3 % so where
// they are long, and lose a quarter where they are short.)
template <class T>
struct PixelsInPlace {
  const float* rows;
  int64_t pitch;

  static bool are_rows(const PointwiseForward& p, int64_t count) {
    return p.grid.is_dense() && p.prologue.is_identity() && p.k % 32 == 0 && count % 32 == 0 &&
           p.x.ld % 2 == 0;
  }
  PixelsInPlace(const PointwiseForward& p, int64_t first)
      : rows(reinterpret_cast<const float*>(static_cast<const T*>(p.x.data) + first * p.x.ld)),
        pitch(p.x.ld / 2) {}

  const float* at(int64_t row, int64_t word) const { return rows + row * pitch + word; }
  int64_t row_words() const { return pitch; }
};

template <class T>
void forward(const PointwiseForward& p) {
  using Words = typename WordsOf<T>::type;
  for_product_units<T>(p.grid.pixels(), p.k, p.n, p.packed_weight, p.epilogue, [&](const auto& unit) {
    if constexpr (kHasTiles<Words>)
      if (PixelsInPlace<T>::are_rows(p, unit.count))
        return multiply_tile(PixelsInPlace<T>(p, unit.first), unit.count, unit.b, unit.first_panel,
                             unit.last_panel, unit.sink);
    multiply_filled<TileWriter<Words>>(unit, [&](int64_t first, int64_t count, const auto& a) {
      fill_rows<T>(p.grid, p.x, p.prologue, p.k, first, count, a);
    });
  });
}

void pointwise_forward(const PointwiseForward& p) {
  by_dtype(p.dtype, &Kernels::pointwise_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_pointwise_forward(Kernels& k) { k.pointwise_forward = pointwise_forward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
