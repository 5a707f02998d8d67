// Maximum pooling forward, a vector of channels at a time; bounded by the one read of its input.
#include "cpu/epilogue.h"
#include "cpu/kernels.h"

namespace fastcnn {
namespace {

struct Window {
  int64_t first, last;

  Window(int64_t out, int kernel, int stride, int pad, int64_t size) {
    first = out * stride - pad;
    last = first + kernel < size ? first + kernel : size;
    if (first < 0) first = 0;
  }
};

template <class T>
void forward_row(const MaxPool2dForward& p, int64_t row) {
  const int64_t image = row / p.out_h;
  const Window h(row % p.out_h, p.kernel_h, p.stride_h, p.pad_h, p.in_h);
  const T* base = static_cast<const T*>(p.x.data) + image * p.in_h * p.in_w * p.x.ld;
  T* out = static_cast<T*>(p.out) + row * p.out_w * p.out_ld;
  for (int64_t q = 0; q < p.out_w; ++q, out += p.out_ld) {
    const Window w(q, p.kernel_w, p.stride_w, p.pad_w, p.in_w);
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      V best = set(-INFINITY);
      for (int64_t y = h.first; y < h.last; ++y)
        for (int64_t x = w.first; x < w.last; ++x)
          best = maximum(best, load_upto(base + (y * p.in_w + x) * p.x.ld + c, p.channels - c));
      store_upto(out + c, best, p.channels - c);
    }
  }
}

void max_pool2d_forward(const MaxPool2dForward& p) {
  parallel_for(p.images * p.out_h, [&](int64_t row) {
    p.dtype == kFloat32 ? forward_row<float>(p, row) : forward_row<bf16>(p, row);
  });
}

}  // namespace

namespace FASTCNN_ISA {
void register_max_pool2d(Kernels& k) { k.max_pool2d_forward = max_pool2d_forward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
