// Local response normalisation and its gradient, a few pixels at a time: what windows sum over lies in
// scratch with zeros on either side, so that a window is a few loads at neighbouring places.
#include "cpu/by_dtype.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"

namespace fastcnn {
namespace {

// A row is read back while the next ones are written: reads that overlap a store that is still in flight
// wait.
constexpr int kTilePixels = 8;
constexpr int64_t kUnitElements = 16384;

enum Power { kThreeQuarters, kHalf, kOne, kAnyPower };

struct Powers {
  V factor, inverse;  // d^-beta, 1 / d
};

template <int kPower>
inline Powers powers(V d, float beta) {
  if constexpr (kPower == kThreeQuarters) {
    const V root4 = inverse_root4(d), root2 = mul(root4, root4);
    return {mul(root4, root2), mul(root2, root2)};
  }
  const V inverse = div(set(1.0f), d);
  if constexpr (kPower == kHalf) return {mul(sqrt(d), inverse), inverse};
  if constexpr (kPower == kOne) return {inverse, inverse};
  return {exp(mul(set(-beta), log(d))), inverse};
}

template <class F>
void with_power(float beta, const F& f) {
  if (beta == 0.75f) return f(std::integral_constant<int, kThreeQuarters>());
  if (beta == 0.5f) return f(std::integral_constant<int, kHalf>());
  if (beta == 1.0f) return f(std::integral_constant<int, kOne>());
  f(std::integral_constant<int, kAnyPower>());
}

// One row of channels for each pixel of a tile.
struct Rows {
  float* first;
  int64_t pitch;

  float* operator[](int64_t row) const { return first + row * pitch; }
};

// A unit's scratch: squares, and for the gradient what windows pass on and what goes straight through.
struct Scratch {
  Rows squares, products, direct;

  Scratch(int64_t channels, int64_t reach, bool gradient) {
    const int64_t front = round_up(reach, kLanes), pitch = front + round_up(channels, kLanes) + front;
    const size_t floats = size_t(kTilePixels * pitch);
    float* data = thread_scratch(floats * (gradient ? 3 : 1));
    std::memset(data, 0, floats * (gradient ? 2 : 1) * sizeof(float));
    squares = {data + front, pitch};
    products = {squares.first + floats, pitch};
    direct = {products.first + floats, pitch};
  }
};

inline V window_sum(const float* at, int64_t before, int64_t after) {
  V sum = load(at - before);
  for (int64_t i = 1 - before; i <= after; ++i) sum = add(sum, load(at + i));
  return sum;
}

template <class T>
const T* pixel_of(const Activations& a, int64_t pixel) {
  return static_cast<const T*>(a.data) + pixel * a.ld;
}

template <class T>
void square_tile(const LocalResponseNorm& p, int64_t first, int64_t count, const Rows& squares) {
  for (int64_t i = 0; i < count; ++i) {
    const T* x = pixel_of<T>(p.x, first + i);
    for_lanes(p.channels, [&](int64_t c, auto lanes) {
      const V value = lanes.get(x + c);
      lanes.put(squares[i] + c, mul(value, value));
    });
  }
}

// Of a channel, from the squares in its window; of those that overflow infinity's power is left.
template <int kPower>
inline Powers powers_at(const LocalResponseNorm& p, const float* squares) {
  const V d = fmadd(window_sum(squares, p.before, p.after), set(p.share), set(p.k)),
          most = set(3.4028235e38f);
  const Powers found = powers<kPower>(min(d, most), p.beta);
  const V infinite = set(p.beta > 0.0f ? 0.0f : p.beta == 0.0f ? 1.0f : INFINITY);
  return {where_gt(d, most, infinite, found.factor), found.inverse};
}

template <class T, int kPower>
void forward_tile(const LocalResponseNorm& p, int64_t first, int64_t count, const Scratch& s) {
  square_tile<T>(p, first, count, s.squares);
  for (int64_t i = 0; i < count; ++i) {
    const T* x = pixel_of<T>(p.x, first + i);
    T* out = static_cast<T*>(p.out) + (first + i) * p.out_ld;
    for_lanes(p.channels, [&](int64_t c, auto lanes) {
      lanes.put(out + c, mul(lanes.get(x + c), powers_at<kPower>(p, s.squares[i] + c).factor));
    });
  }
}

template <class T, int kPower>
void backward_tile(const LocalResponseNorm& p, int64_t first, int64_t count, const Scratch& s) {
  square_tile<T>(p, first, count, s.squares);
  for (int64_t i = 0; i < count; ++i) {
    const T *x = pixel_of<T>(p.x, first + i), *grad = pixel_of<T>(p.grad, first + i);
    for_lanes(p.channels, [&](int64_t c, auto lanes) {
      const Powers d = powers_at<kPower>(p, s.squares[i] + c);
      const V direct = mul(lanes.get(grad + c), d.factor);
      lanes.put(s.direct[i] + c, direct);
      lanes.put(s.products[i] + c, mul(direct, mul(lanes.get(x + c), d.inverse)));
    });
  }
  const V slope = set(2.0f * p.share * p.beta);
  for (int64_t i = 0; i < count; ++i) {
    const T* x = pixel_of<T>(p.x, first + i);
    T* dx = static_cast<T*>(p.out) + (first + i) * p.out_ld;
    for_lanes(p.channels, [&](int64_t c, auto lanes) {
      // Whose window sees this channel lies as far before it as a window reaches after its own.
      const V passed_on = window_sum(s.products[i] + c, p.after, p.before);
      lanes.put(dx + c, fnmadd(mul(slope, lanes.get(x + c)), passed_on, lanes.get(s.direct[i] + c)));
    });
  }
}

template <class T>
void normalise(const LocalResponseNorm& p) {
  if (!p.pixels || !p.channels) return;
  const int64_t tiles = ceil_div(p.pixels, kTilePixels), elements = kTilePixels * p.channels;
  const int64_t per_unit = ceil_div(kUnitElements, elements);
  with_power(p.beta, [&](auto power) {
    parallel_for(ceil_div(tiles, per_unit), [&](int64_t unit) {
      const Scratch scratch(p.channels, p.before, p.grad.data);
      for (int64_t tile = unit * per_unit; tile < tiles && tile < (unit + 1) * per_unit; ++tile) {
        const int64_t first = tile * kTilePixels;
        const int64_t count = p.pixels - first < kTilePixels ? p.pixels - first : kTilePixels;
        if (p.grad.data)
          backward_tile<T, power()>(p, first, count, scratch);
        else
          forward_tile<T, power()>(p, first, count, scratch);
      }
    });
  });
}

void local_response_norm(const LocalResponseNorm& p) {
  by_dtype(p.dtype, &Kernels::local_response_norm, p, [&](auto t) { normalise<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_local_response_norm(Kernels& k) { k.local_response_norm = local_response_norm; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
