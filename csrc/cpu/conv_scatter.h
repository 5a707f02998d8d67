// The data gradient of a dense convolution by scattering: every tap's product of dy is added to the input
// pixels that it reaches. Where kernels are wide and images small, a product that gathers the taps of an
// input pixel (conv2d_backward.cpp) multiplies mostly zeros from beyond dy's edge.
#pragma once

#include <cstring>

#include "cpu/conv_stripes.h"
#include "cpu/dx_sink.h"
#include "cpu/product_forward.h"

namespace fastcnn {
namespace {

// dy of a unit's images and two panels of their dx: half of a 1 MB L2 with what passes through.
constexpr int64_t kScatterBytes = 384 * 1024;

// Bytes of L2 that one image takes.
template <class Words>
int64_t scatter_bytes(const Conv2dShape& s, int64_t words) {
  return (tile_floats<Words>(s.out_h * s.out_w, words) + s.in_h * s.in_w * kMicroVectors * kLanes) * 4;
}

// Whether gathering would multiply a quarter more than scattering.
template <class Words>
bool scatters_gradient(const Conv2dShape& s) {
  int64_t gathered = 0;
  for (int i = 0; i < s.stride_h * s.stride_w; ++i) {
    const DgradPhase phase = dgrad_phase(s, i);
    gathered += phase.lines * phase.columns * phase.taps();
  }
  return gathered * 4 > 5 * s.out_h * s.out_w * s.taps() &&
         scatter_bytes<Words>(s, reduction_words<Words>(s.n)) <= kScatterBytes;
}

// An output pixel of a unit and the input pixel under the first tap of an unpadded kernel.
struct ScatterRow {
  int32_t y, x, pixel;
};

// Adds a tap's products to the input pixels at (y + h, x + w), those that there are.
struct ScatterSink {
  const Conv2dShape& s;
  const ScatterRow* pixels;
  int h, w;
  float* dx;  // [pixel][ld], channels from first_column on
  int64_t ld, first_column;

  void operator()(const float* c, int64_t ldc, int64_t row, int64_t rows, int64_t column,
                  int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      const ScatterRow& at = pixels[row + r];
      if (uint32_t(at.y + h) >= uint32_t(s.in_h) || uint32_t(at.x + w) >= uint32_t(s.in_w)) continue;
      float* to = dx + (at.pixel + int64_t(h) * s.in_w + w) * ld + column - first_column;
      for (int64_t v = 0; v < columns; v += kLanes) store(to + v, add(load(to + v), load(c + r * ldc + v)));
    }
  }
};

template <class T, class Words>
class ScatteredDataGradient {
 public:
  explicit ScatteredDataGradient(const Conv2dBackward& p)
      : p_(p),
        s_(p.shape),
        words_(reduction_words<Words>(s_.n)),
        panels_(ceil_div(s_.channels, kLanes)),
        pitch_(panels_ * kLanes),
        tap_floats_(panels_ * words_ * kLanes),
        unit_images_(images_of_unit()),
        units_(ceil_div(s_.images, unit_images_)),
        packed_(size_t(s_.taps() * tap_floats_)),
        rows_(size_t(unit_images_ * out_pixels())) {
    pack();
    for (int64_t row = 0; row < unit_images_ * out_pixels(); ++row) {
      const int64_t y = row / s_.out_w % s_.out_h * s_.stride_h, x = row % s_.out_w * s_.stride_w;
      rows_[size_t(row)] = {int32_t(y), int32_t(x),
                            int32_t(row / out_pixels() * in_pixels() + y * s_.in_w + x)};
    }
  }

  void run() {
    const int64_t splits = column_splits(units_, panels_);
    AlignedBuffer<float> sums(p_.output.sums ? size_t(units_ * 2 * pitch_) : 1);
    parallel_for(units_ * splits, [&](int64_t task) {
      const int64_t unit = task / splits, split = task % splits;
      multiply(unit, panels_ * split / splits, panels_ * (split + 1) / splits,
               sums.data() + unit * 2 * pitch_);
    });
    if (p_.output.sums) merge_sums(sums.data(), units_, s_.channels, pitch_, p_.output.sums);
  }

 private:
  int64_t in_pixels() const { return s_.in_h * s_.in_w; }
  int64_t out_pixels() const { return s_.out_h * s_.out_w; }
  int64_t images_of_unit() const {
    const int64_t fit = kScatterBytes / scatter_bytes<Words>(s_, words_);
    return fit < 1 ? 1 : fit < s_.images ? fit : s_.images;
  }

  void pack() {
    const Conv2dWeight& w = p_.weight;
    MatrixSource m;
    m.k = s_.n;
    m.n = s_.channels;
    m.dtype = w.dtype;
    m.data = w.data;
    m.stride_k = w.stride_n;
    m.stride_n = w.stride_c;
    m.taps_h = s_.kernel_h;
    m.taps_w = s_.kernel_w;
    m.stride_tap_h = w.stride_h;
    m.stride_tap_w = w.stride_w;
    m.tap_major = true;
    kernels().pack_matrix(m, Words::kPerWord == 1 ? kFloat32 : s_.dtype, packed_.data());
  }

  // dx of a unit's images, channels of panels [first_panel, last_panel).
  void multiply(int64_t unit, int64_t first_panel, int64_t last_panel, float* sums) {
    const int64_t image = unit * unit_images_,
                  images = s_.images - image < unit_images_ ? s_.images - image : unit_images_;
    const int64_t rows = images * out_pixels(), tile = tile_floats<Words>(rows, words_);
    const int64_t pixels = images * in_pixels(), ld = kMicroVectors * kLanes;
    const TileWriter<Words> dy{thread_scratch(size_t(tile + pixels * ld)), rows};
    float* dx = dy.tile + tile;
    fill(dy, image * out_pixels(), rows);
    if (p_.output.sums)
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t c = first_panel * kLanes; c < last_panel * kLanes; ++c) sums[half * pitch_ + c] = 0;
    const DxTarget target{
        {s_.images, s_.in_h, s_.in_w, s_.in_h, s_.in_w, 1, 1}, s_.channels, p_.input, p_.output};
    const DxSink<T> sink(target, image * in_pixels(), pitch_, sums, false);
    for (int64_t panel = first_panel; panel < last_panel; panel += kMicroVectors) {
      const int64_t end = panel + kMicroVectors < last_panel ? panel + kMicroVectors : last_panel;
      scatter(dy, rows, panel, end, dx, pixels * ld, ld);
      for (int64_t at = 0; at < pixels; at += s_.in_w)
        sink(dx + at * ld, ld, at, s_.in_w, panel * kLanes, (end - panel) * kLanes);
    }
  }

  void fill(const TileWriter<Words>& dy, int64_t first, int64_t rows) const {
    with_gradient<T>(p_.gradient, s_.n, [&](const auto& gradient) {
      fill_tile(
          dy, rows, s_.n, [&](int64_t row) { return first + row; },
          [&](int64_t c) { return gradient.at(c); });
    });
  }

  void scatter(const TileWriter<Words>& dy, int64_t rows, int64_t panel, int64_t end, float* dx,
               int64_t floats, int64_t ld) {
    std::memset(dx, 0, size_t(floats) * sizeof(float));
    for (int kh = 0; kh < s_.kernel_h; ++kh)
      for (int kw = 0; kw < s_.kernel_w; ++kw) {
        const PackedView<Words> b(packed_.data() + (kh * s_.kernel_w + kw) * tap_floats_, s_.n);
        const int h = kh * s_.dilation_h - s_.pad_h, w = kw * s_.dilation_w - s_.pad_w;
        multiply_tile(dy, rows, b, panel, end, ScatterSink{s_, rows_.data(), h, w, dx, ld, panel * kLanes});
      }
  }

  const Conv2dBackward& p_;
  const Conv2dShape& s_;
  const int64_t words_, panels_, pitch_, tap_floats_, unit_images_, units_;
  AlignedBuffer<float> packed_;
  AlignedBuffer<ScatterRow> rows_;
};

}  // namespace
}  // namespace fastcnn
