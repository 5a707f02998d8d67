// A grouped convolution as dense ones over slices of the channels: groups that no narrower kernel takes
// (group_stencil.h). Narrow ones are merged until a slice fills a vector, with zeros between them.
#pragma once

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "ops/conv2d.h"

namespace fastcnn {
namespace {

constexpr int64_t kLeastSlice = 16;

inline float weight_at(const Conv2dWeight& w, int64_t n, int64_t c, int64_t kh, int64_t kw) {
  const int64_t at = n * w.stride_n + c * w.stride_c + kh * w.stride_h + kw * w.stride_w;
  return w.dtype == kFloat32 ? static_cast<const float*>(w.data)[at]
                             : to_float(static_cast<const bf16*>(w.data)[at]);
}

class ConvSlices {
 public:
  explicit ConvSlices(const Conv2dShape& s)
      : s_(s), c_(s.channels / s.groups), n_(s.n / s.groups), merged_(merge()), shape_(s) {
    shape_.channels = merged_ * c_;
    shape_.n = merged_ * n_;
    shape_.groups = 1;
  }

  int64_t count() const { return s_.groups / merged_; }
  const Conv2dShape& shape() const { return shape_; }  // of one slice
  int64_t first_channel(int64_t slice) const { return slice * shape_.channels; }
  int64_t first_output(int64_t slice) const { return slice * shape_.n; }
  int64_t weight_floats() const { return shape_.n * shape_.channels * s_.taps(); }

  // The slice's weight; one of merged groups is written into `buffer` of weight_floats().
  Conv2dWeight weight(const Conv2dWeight& w, int64_t slice, float* buffer) const {
    if (is_merged()) return dense_weight(w, slice, buffer);
    Conv2dWeight own = w;
    own.data = static_cast<const char*>(w.data) + first_output(slice) * w.stride_n * bytes_of(w.dtype);
    return own;
  }
  // The slice's weight as [n][taps][channels] of floats in `buffer`.
  Conv2dWeight dense_weight(const Conv2dWeight& w, int64_t slice, float* buffer) const {
    std::memset(buffer, 0, size_t(weight_floats()) * sizeof(float));
    for_elements([&](int64_t n, int64_t c, int64_t kh, int64_t kw, int64_t at) {
      buffer[at] = weight_at(w, first_output(slice) + n, c, kh, kw);
    });
    return layout(buffer);
  }
  // Weights as [n][taps][channels] of a slice.
  Conv2dWeight layout(const float* data) const {
    const int64_t c = shape_.channels;
    return {data, kFloat32, s_.taps() * c, 1, s_.kernel_w * c, c};
  }
  // Puts a slice's weight gradient [n][taps][channels] into dw with the strides of `to`.
  void scatter(const float* slice_dw, int64_t slice, float* dw, const Conv2dWeight& to) const {
    float* own = dw + first_output(slice) * to.stride_n;
    for_elements([&](int64_t n, int64_t c, int64_t kh, int64_t kw, int64_t at) {
      own[n * to.stride_n + c * to.stride_c + kh * to.stride_h + kw * to.stride_w] = slice_dw[at];
    });
  }
  bool is_merged() const { return merged_ > 1; }

 private:
  int64_t merge() const {
    const int64_t narrow = c_ < n_ ? c_ : n_;
    int64_t merged = 1;
    while (merged < s_.groups && (s_.groups % merged || merged * narrow < kLeastSlice)) ++merged;
    return merged;
  }

  // f(n, c, kh, kw, at): c within its group, at in the slice's own weight.
  template <class F>
  void for_elements(const F& f) const {
    for (int64_t n = 0; n < shape_.n; ++n)
      for (int64_t kh = 0; kh < s_.kernel_h; ++kh)
        for (int64_t kw = 0; kw < s_.kernel_w; ++kw)
          for (int64_t c = 0; c < c_; ++c)
            f(n, c, kh, kw, ((n * s_.kernel_h + kh) * s_.kernel_w + kw) * shape_.channels + n / n_ * c_ + c);
  }

  const Conv2dShape& s_;
  const int64_t c_, n_, merged_;
  Conv2dShape shape_;
};

template <class T>
T* advanced(T* p, int64_t by) {
  return p ? p + by : p;
}
inline const void* advanced(const void* p, int64_t elements, Dtype dtype) {
  return p ? static_cast<const char*>(p) + elements * bytes_of(dtype) : p;
}
inline void* advanced(void* p, int64_t elements, Dtype dtype) {
  return p ? static_cast<char*>(p) + elements * bytes_of(dtype) : p;
}
inline ScaleShiftAct from_channel(ScaleShiftAct a, int64_t c) {
  a.scale = advanced(a.scale, c);
  a.shift = advanced(a.shift, c);
  return a;
}
inline Activations from_channel(Activations x, int64_t c, Dtype dtype) {
  x.data = advanced(x.data, c, dtype);
  return x;
}

}  // namespace
}  // namespace fastcnn
