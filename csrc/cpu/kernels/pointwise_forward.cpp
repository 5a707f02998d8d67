// Pointwise convolution forward: A tiles of pixels with the prologue applied, times packed weights, with an
// epilogue.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/pixel_rows.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

#if FASTCNN_ISA_LEVEL >= 4
// Pixels that AMX reads where they are.
struct PixelsInPlace {
  const float* rows;
  int64_t pitch;

  const float* at(int64_t row, int64_t word) const { return rows + row * pitch + word; }
  int64_t row_words() const { return pitch; }
};

// Whole tiles of channels and of pixels: nothing beyond them is read.
bool reads_in_place(const PointwiseForward& p) {
  return p.grid.is_dense() && p.prologue.is_identity() && p.k % (2 * kTileWords) == 0 && p.x.ld % 2 == 0;
}
#endif

template <class T>
void forward(const PointwiseForward& p) {
  using Words = typename WordsOf<T>::type;
  const int64_t words = reduction_words<Words>(p.k);
  product_of_rows<T>(p.grid.pixels(), p.k, p.n, p.packed_weight, p.epilogue,
                     [&](int64_t first, int64_t count, int64_t rows, const auto& multiply) {
#if FASTCNN_ISA_LEVEL >= 4
                       if constexpr (Words::kPerWord == 2)
                         if (reads_in_place(p) && count % kAmxBlock == 0)
                           return multiply(PixelsInPlace{
                               static_cast<const float*>(p.x.data) + first * (p.x.ld / 2), p.x.ld / 2});
#endif
                       const auto a = TileWriter<Words>::in_scratch(rows, words);
                       fill_rows<T>(p.grid, p.x, p.prologue, p.k, first, count, a);
                       multiply(a);
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
