// Average pooling with a prologue, a vector of channels at a time; bounded by the one read of its operands.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/pool_windows.h"
#include "cpu/prologue.h"
#include "cpu/statistics.h"

namespace fastcnn {
namespace {

int64_t values(const AvgPool2dShape& s, const Window& h, const Window& w) {
  return s.counts_padding ? int64_t(s.kernel_h) * s.kernel_w : h.count() * w.count();
}

// A line of windows that have no columns in common: sums of columns would go through memory for nothing (10 %
// of 2 x 2 in float32).
template <class T, class Prologue>
void forward_apart(const AvgPool2dForward& p, const Prologue& prologue, int64_t row, int64_t above,
                   const Window& h) {
  const AvgPool2dShape& s = p.shape;
  T* out = static_cast<T*>(p.out) + row * s.out_w * p.out_ld;
  for (int64_t q = 0; q < s.out_w; ++q, out += p.out_ld) {
    const Window w(q, s.kernel_w, s.stride_w, s.pad_w, s.in_w);
    const V share = set(1.0f / float(values(s, h, w)));
    for_vectors(s.channels, [&](int64_t c, auto whole) {
      const auto value = input_column<T>(p.x, prologue, c, s.channels);
      V sum = zero();
      for (int64_t r = 0; r < h.count(); ++r)
        for (int64_t x = w.first; x < w.last; ++x) sum = add(sum, value(above + r * s.in_w + x, whole));
      if constexpr (whole)
        store(out + c, mul(sum, share));
      else
        store_upto(out + c, mul(sum, share), s.channels - c);
    });
  }
}

// First down the columns, then along the line: a window of 3 x 3 costs 6 reads, not 9, and its prologue 3.
template <class T, class Prologue>
void forward_row(const AvgPool2dForward& p, const Prologue& prologue, int64_t row) {
  const AvgPool2dShape& s = p.shape;
  const Window h(row % s.out_h, s.kernel_h, s.stride_h, s.pad_h, s.in_h);
  const int64_t above = (row / s.out_h * s.in_h + h.first) * s.in_w, pitch = round_up(s.channels, kLanes);
  if (s.stride_w >= s.kernel_w) return forward_apart<T>(p, prologue, row, above, h);
  float* columns = thread_scratch(size_t(s.in_w * pitch));
  with_window(h.count(), [&](auto lines) {
    for_rows(s.in_w, [&](int64_t i, auto group) {
      for_vectors(s.channels, [&](int64_t c, auto whole) {
        const auto value = input_column<T>(p.x, prologue, c, s.channels);
        for (int64_t pixel = i; pixel < i + group; ++pixel) {
          V sum = zero();
          for (int64_t r = 0; r < lines; ++r) sum = add(sum, value(above + r * s.in_w + pixel, whole));
          store(columns + pixel * pitch + c, sum);
        }
      });
    });
  });

  T* out = static_cast<T*>(p.out) + row * s.out_w * p.out_ld;
  for (int64_t q = 0; q < s.out_w; ++q, out += p.out_ld) {
    const Window w(q, s.kernel_w, s.stride_w, s.pad_w, s.in_w);
    const V share = set(1.0f / float(values(s, h, w)));
    with_window(w.count(), [&](auto count) {
      for_lanes(s.channels, [&](int64_t c, auto lanes) {
        V sum = zero();
        for (int64_t i = 0; i < count; ++i) sum = add(sum, load(columns + (w.first + i) * pitch + c));
        lanes.put(out + c, mul(sum, share));
      });
    });
  }
}

// dx of one input line, and its share of sums [2][pitch] (null: none).
template <class T, int kAct>
void backward_row(const AvgPool2dBackward& p, int64_t row, float* sums, int64_t pitch) {
  const AvgPool2dShape& s = p.shape;
  const ScaleShiftAct& pre = p.input.affine;
  const int64_t image = row / s.in_h, y = row % s.in_h;
  const Reach h(y, s.kernel_h, s.stride_h, s.pad_h, s.out_h);
  for (int64_t x = 0; x < s.in_w; ++x) {
    const Reach w(x, s.kernel_w, s.stride_w, s.pad_w, s.out_w);
    const int64_t pixel = row * s.in_w + x;
    const T* value = static_cast<const T*>(p.input.x.data) + pixel * p.input.x.ld;
    T* dx = static_cast<T*>(p.dx) + pixel * p.dx_ld;
    for_lanes(s.channels, [&](int64_t c, auto lanes) {
      V g = zero();
      for (int64_t i = h.first; i < h.last; ++i)
        for (int64_t j = w.first; j < w.last; ++j) {
          const Window down(i, s.kernel_h, s.stride_h, s.pad_h, s.in_h),
              across(j, s.kernel_w, s.stride_w, s.pad_w, s.in_w);
          const T* grad =
              static_cast<const T*>(p.grad.data) + ((image * s.out_h + i) * s.out_w + j) * p.grad.ld;
          g = fmadd(lanes.get(grad + c), set(1.0f / float(values(s, down, across))), g);
        }
      if (kAct || sums) {
        const V own = lanes.get(value + c);
        if (kAct) {
          const V scale = pre.scale ? lanes.get(pre.scale + c) : set(1.0f);
          const V shift = pre.shift ? lanes.get(pre.shift + c) : zero();
          g = activate_grad(kAct, fmadd(own, scale, shift), g);
        }
        if (sums) {
          const V mean = p.input.mean ? lanes.get(p.input.mean + c) : zero();
          store(sums + c, add(load(sums + c), g));
          store(sums + pitch + c, fmadd(g, sub(own, mean), load(sums + pitch + c)));
        }
      }
      lanes.put(dx + c, g);
    });
  }
}

template <class T>
void forward(const AvgPool2dForward& p) {
  with_prologue(p.prologue, [&](const auto& pre) {
    parallel_for(p.shape.images * p.shape.out_h, [&](int64_t row) { forward_row<T>(p, pre, row); });
  });
}

template <class T>
void backward(const AvgPool2dBackward& p) {
  const AvgPool2dShape& s = p.shape;
  const int64_t rows = s.images * s.in_h, pitch = round_up(s.channels, 16);
  const int64_t unit_rows = s.in_w < kUnitPixels ? kUnitPixels / (s.in_w > 0 ? s.in_w : 1) : 1;
  const int64_t units = ceil_div(rows, unit_rows);
  AlignedBuffer<float> parts(p.sums ? size_t(units * 2 * pitch) + 1 : 1);
  with_activation(p.input.affine.act, [&](auto act) {
    parallel_for(units, [&](int64_t unit) {
      float* part = p.sums ? parts.data() + unit * 2 * pitch : nullptr;
      if (part) std::memset(part, 0, size_t(2 * pitch) * sizeof(float));
      for (int64_t row = unit * unit_rows; row < rows && row < (unit + 1) * unit_rows; ++row)
        backward_row<T, act()>(p, row, part, pitch);
    });
  });
  if (p.sums) merge_sums(parts.data(), units, s.channels, pitch, p.sums);
}

void avg_pool2d_forward(const AvgPool2dForward& p) {
  by_dtype(p.shape.dtype, &Kernels::avg_pool2d_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}

void avg_pool2d_backward(const AvgPool2dBackward& p) {
  by_dtype(p.shape.dtype, &Kernels::avg_pool2d_backward, p, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_avg_pool2d(Kernels& k) {
  k.avg_pool2d_forward = avg_pool2d_forward;
  k.avg_pool2d_backward = avg_pool2d_backward;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
