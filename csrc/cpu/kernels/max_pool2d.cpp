// Maximum pooling, a vector of channels at a time; bounded by the one read of its operands.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/pool_windows.h"
#include "cpu/prologue.h"

namespace fastcnn {
namespace {

template <class T, bool kIndexed>
void forward_row(const MaxPool2dForward& p, int64_t row) {
  const int64_t image = row / p.out_h, up = row % p.out_h * p.stride_h - p.pad_h;
  const Window h(row % p.out_h, p.kernel_h, p.stride_h, p.pad_h, p.in_h);
  const T* base = static_cast<const T*>(p.x.data) + image * p.in_h * p.in_w * p.x.ld;
  T* out = static_cast<T*>(p.out) + row * p.out_w * p.out_ld;
  for (int64_t q = 0; q < p.out_w; ++q, out += p.out_ld) {
    const Window w(q, p.kernel_w, p.stride_w, p.pad_w, p.in_w);
    const int64_t left = q * p.stride_w - p.pad_w;
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      V best = set(-INFINITY), index = set(float((h.first - up) * p.kernel_w + w.first - left));
      for (int64_t y = h.first; y < h.last; ++y)
        for (int64_t x = w.first; x < w.last; ++x) {
          const V value = load_upto(base + (y * p.in_w + x) * p.x.ld + c, p.channels - c);
          if constexpr (kIndexed)
            index = where_gt(value, best, set(float((y - up) * p.kernel_w + x - left)), index);
          best = maximum(best, value);
        }
      store_upto(out + c, best, p.channels - c);
      if constexpr (kIndexed) {
        const int64_t rest = p.channels - c;
        store_bytes(p.index + (row * p.out_w + q) * p.channels + c, index,
                    int(rest < kLanes ? rest : kLanes));
      }
    }
  }
}

template <class T>
void backward_row(const MaxPool2dBackward& b, int64_t row) {
  const MaxPool2dForward& p = b.geometry;
  const int64_t image = row / p.in_h, y = row % p.in_h;
  const Reach h(y, p.kernel_h, p.stride_h, p.pad_h, p.out_h);
  T* dx = static_cast<T*>(b.dx) + row * p.in_w * b.dx_ld;
  for (int64_t x = 0; x < p.in_w; ++x, dx += b.dx_ld) {
    const Reach w(x, p.kernel_w, p.stride_w, p.pad_w, p.out_w);
    for (int64_t c = 0; c < p.channels; c += kLanes) {
      const int64_t rest = p.channels - c;
      V sum = zero();
      for (int64_t i = h.first; i < h.last; ++i)
        for (int64_t j = w.first; j < w.last; ++j) {
          const int64_t pixel = (image * p.out_h + i) * p.out_w + j;
          const int64_t own = (y - i * p.stride_h + p.pad_h) * p.kernel_w + x - j * p.stride_w + p.pad_w;
          const V index = load_bytes(b.index + pixel * p.channels + c, int(rest < kLanes ? rest : kLanes));
          const V grad = load_upto(static_cast<const T*>(b.grad.data) + pixel * b.grad.ld + c, rest);
          const V above = where_gt(index, set(float(own) - 0.5f), grad, zero());
          sum = add(sum, where_gt(set(float(own) + 0.5f), index, above, zero()));
        }
      store_upto(dx + c, sum, rest);
    }
  }
}

template <class T>
void forward(const MaxPool2dForward& p) {
  parallel_for(p.images * p.out_h,
               [&](int64_t row) { p.index ? forward_row<T, true>(p, row) : forward_row<T, false>(p, row); });
}

void max_pool2d_forward(const MaxPool2dForward& p) {
  by_dtype(p.dtype, &Kernels::max_pool2d_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}

void max_pool2d_backward(const MaxPool2dBackward& p) {
  by_dtype(p.geometry.dtype, &Kernels::max_pool2d_backward, p, [&](auto t) {
    parallel_for(p.geometry.images * p.geometry.in_h,
                 [&](int64_t row) { backward_row<decltype(t)>(p, row); });
  });
}

}  // namespace

namespace FASTCNN_ISA {
void register_max_pool2d(Kernels& k) {
  k.max_pool2d_forward = max_pool2d_forward;
  k.max_pool2d_backward = max_pool2d_backward;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
