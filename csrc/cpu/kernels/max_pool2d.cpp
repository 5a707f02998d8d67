// Maximum pooling, a vector of channels at a time.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/pool_windows.h"
#include "cpu/prologue.h"

namespace fastcnn {
namespace {

// Elements in a form in which the largest is the maximum: float32 as it is.
template <class T>
struct Ordered {
  using Element = float;
  static constexpr int kCount = kLanes;

  static V position(int64_t i) { return set(float(i)); }
  static V sum(V a, V b) { return add(a, b); }
  static V get(const float* p) { return load(p); }
  static V get(const float* p, int64_t n) { return load_upto(p, n); }
  static void put(float* p, V v, int64_t n) { store_upto(p, v, n); }
};

// bfloat16 as whole numbers, from -infinity (0) to infinity and then every NaN, twice as many to a vector. A
// negative number is its magnitude's complement, so that both zeros are one; less -infinity's, the negative
// NaNs wrap around to the top.
template <>
struct Ordered<bf16> {
  using Element = uint16_t;
  static constexpr int kCount = 2 * kLanes;
  static constexpr uint16_t kInfinity = 0x7f80;

  static W position(int64_t i) { return words_of(uint16_t(i)); }
  static W sum(W a, W b) { return add_words(a, b); }
  static W ordered(W w) { return sub_words(add_words(flip_negative(w), words_of(kInfinity)), signs(w)); }
  static W get(const bf16* p) { return ordered(load(reinterpret_cast<const uint16_t*>(p))); }
  static W get(const bf16* p, int64_t n) { return ordered(load_words(p, n < kCount ? int(n) : kCount)); }
  static void put(bf16* p, W w, int64_t n) {
    const W number = sub_words(w, words_of(kInfinity));
    store_words(p, flip_negative(add_words(number, signs(number))), n < kCount ? int(n) : kCount);
  }
};

// The largest of every column of a line of windows, and where it is as r * kernel_w: [in_w][channels] each.
template <class T, bool kIndexed>
struct ColumnMaxima {
  using O = Ordered<T>;
  using Element = typename O::Element;
  Element *largest, *row;

  ColumnMaxima(const MaxPool2dForward& p) {
    const int64_t pitch = round_up(p.in_w * p.channels + O::kCount, 64);
    largest = reinterpret_cast<Element*>(
        thread_scratch(size_t(pitch) * (kIndexed ? 2 : 1) * sizeof(Element) / sizeof(float)));
    row = largest + pitch;
  }

  // `count` elements from x on, whose lines are `line` elements apart, to the buffer at `at`.
  void take(const T* x, int64_t line, int64_t lines, int64_t count, int64_t at, int64_t first,
            int64_t kernel_w) {
    with_window(lines, [&](auto n) {
      const auto vector = [&](int64_t c, auto... rest) {
        auto best = O::get(x + c, rest...);
        [[maybe_unused]] auto index = O::position(first * kernel_w);
        for (int64_t r = 1; r < n; ++r) {
          const auto value = O::get(x + r * line + c, rest...);
          if constexpr (kIndexed) index = where_gt(value, best, O::position((first + r) * kernel_w), index);
          best = maximum(best, value);
        }
        store(largest + at + c, best);
        if constexpr (kIndexed) store(row + at + c, index);
      };
      int64_t c = 0;
      for (; c + O::kCount <= count; c += O::kCount) vector(c);
      if (c < count) vector(c, count - c);
    });
  }
};

// First down the columns, then along the line: a window of 3 x 3 costs 6 reads, not 9.
template <class T, bool kIndexed>
void forward_row(const MaxPool2dForward& p, int64_t row) {
  using O = Ordered<T>;
  const int64_t image = row / p.out_h, up = row % p.out_h * p.stride_h - p.pad_h;
  const Window h(row % p.out_h, p.kernel_h, p.stride_h, p.pad_h, p.in_h);
  const int64_t line = p.in_w * p.x.ld;
  const T* x = static_cast<const T*>(p.x.data) + (image * p.in_h + h.first) * line;
  ColumnMaxima<T, kIndexed> columns(p);
  if (p.x.ld == p.channels)
    columns.take(x, line, h.count(), line, 0, h.first - up, p.kernel_w);
  else
    for (int64_t i = 0; i < p.in_w; ++i)
      columns.take(x + i * p.x.ld, line, h.count(), p.channels, i * p.channels, h.first - up, p.kernel_w);

  T* out = static_cast<T*>(p.out) + row * p.out_w * p.out_ld;
  for (int64_t q = 0; q < p.out_w; ++q, out += p.out_ld) {
    const Window w(q, p.kernel_w, p.stride_w, p.pad_w, p.in_w);
    const int64_t left = w.first - (q * p.stride_w - p.pad_w);
    with_window(w.count(), [&](auto n) {
      for (int64_t c = 0; c < p.channels; c += O::kCount) {
        const int64_t at = w.first * p.channels + c, rest = p.channels - c;
        auto best = load(columns.largest + at);
        if constexpr (kIndexed) {
          auto index = O::sum(load(columns.row + at), O::position(left));
          for (int64_t s = 1; s < n; ++s) {
            const auto value = load(columns.largest + at + s * p.channels);
            const auto own = O::sum(load(columns.row + at + s * p.channels), O::position(left + s));
            // Of equal ones the first in the window's order, as in torch.
            index = where_gt(value, best, own, where_gt(best, value, index, min(index, own)));
            best = maximum(best, value);
          }
          store_bytes(p.index + (row * p.out_w + q) * p.channels + c, index,
                      int(rest < O::kCount ? rest : O::kCount));
        } else {
          for (int64_t s = 1; s < n; ++s) best = maximum(best, load(columns.largest + at + s * p.channels));
        }
        O::put(out + c, best, rest);
      }
    });
  }
}

// A window that reaches an input pixel: its output, and the pixel's position in it.
struct Reached {
  int64_t pixel;
  uint8_t position;
};

template <class T>
void backward_row(const MaxPool2dBackward& b, int64_t row) {
  const MaxPool2dForward& p = b.geometry;
  const int64_t image = row / p.in_h, y = row % p.in_h;
  const Reach h(y, p.kernel_h, p.stride_h, p.pad_h, p.out_h);
  T* dx = static_cast<T*>(b.dx) + row * p.in_w * b.dx_ld;
  const T* grads = static_cast<const T*>(b.grad.data);
  Reached windows[kMostPositions];
  for (int64_t x = 0; x < p.in_w; ++x, dx += b.dx_ld) {
    const Reach w(x, p.kernel_w, p.stride_w, p.pad_w, p.out_w);
    int count = 0;
    for (int64_t i = h.first; i < h.last; ++i)
      for (int64_t j = w.first; j < w.last; ++j) {
        const int64_t r = y - i * p.stride_h + p.pad_h, s = x - j * p.stride_w + p.pad_w;
        windows[count++] = {(image * p.out_h + i) * p.out_w + j, uint8_t(r * p.kernel_w + s)};
      }
    for_lanes(p.channels, [&](int64_t c, auto lanes) {
      V sum = zero();
      for (int i = 0; i < count; ++i) {
        const V grad = lanes.get(grads + windows[i].pixel * b.grad.ld + c);
        const uint8_t* index = b.index + windows[i].pixel * p.channels + c;
        sum = add_where_byte(sum, grad, index, windows[i].position, lanes.count);
      }
      lanes.put(dx + c, sum);
    });
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
