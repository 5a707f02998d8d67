// Pointwise convolution forward: A tiles of pixels with the prologue applied, times packed weights, with an
// epilogue.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/pixel_rows.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

template <class T>
void forward(const PointwiseForward& p) {
  product_forward<T>(p.grid.pixels(), p.k, p.n, p.packed_weight, p.epilogue,
                     [&](int64_t first, int64_t count, const auto& a) {
                       fill_rows<T>(p.grid, p.x, p.prologue, p.k, first, count, a);
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
