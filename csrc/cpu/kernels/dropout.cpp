// Inverted dropout, forward and backward: one pass over memory, the mask drawn on the way.
#include "cpu/by_dtype.h"
#include "cpu/dropout_bits.h"
#include "cpu/kernels.h"
#include "cpu/lanes.h"
#include "cpu/parallel.h"
#include "cpu/statistics.h"

namespace fastcnn {
namespace {

constexpr int64_t kMostChunks = 64;  // of the bias gradient's rows

// f(row, c, count) for the stretches of elements [begin, end), each with its bits in `kept`.
template <class F>
void for_stretches(const DropoutMask& m, KeptBits& kept, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t row = begin / m.channels, c = begin % m.channels;
    int64_t count = m.channels - c < end - begin ? m.channels - c : end - begin;
    count = kept.draw(row, c, count < kStretch ? count : kStretch);
    f(row, c, count);
    begin += count;
  }
}

template <class T, int kAct>
void forward_stretch(const DropoutForward& p, const KeptBits& kept, int64_t row, int64_t c, int64_t count) {
  const int64_t first = row * p.mask.channels + c;
  const T* x = static_cast<const T*>(p.x) + first;
  const T* residual = p.residual ? static_cast<const T*>(p.residual) + first : nullptr;
  const float* bias = p.bias ? p.bias + c : nullptr;
  T* out = static_cast<T*>(p.out) + first;
  const V scale = set(p.mask.scale);
  for_lanes(count, [&](int64_t i, auto lanes) {
    V v = lanes.get(x + i);
    if (bias) v = add(v, lanes.get(bias + i));
    v = keep(mul(activate(kAct, v), scale), kept.from(i));
    lanes.put(out + i, residual ? add(v, lanes.get(residual + i)) : v);
  });
}

template <class T>
void forward(const DropoutForward& p) {
  const int64_t elements = p.mask.rows * p.mask.channels;
  with_activation(p.act, [&](auto act) {
    parallel_for(ceil_div(elements, kStretch), [&](int64_t unit) {
      KeptBits kept(p.mask);
      const int64_t begin = unit * kStretch, end = begin + kStretch < elements ? begin + kStretch : elements;
      for_stretches(p.mask, kept, begin, end, [&](int64_t row, int64_t c, int64_t count) {
        forward_stretch<T, act()>(p, kept, row, c, count);
      });
    });
  });
}

// sums: of the gradient of a vector of channels, or null.
template <class T, int kAct>
void backward_stretch(const DropoutBackward& p, const KeptBits& kept, int64_t row, int64_t c, int64_t count,
                      float* sums) {
  const int64_t first = row * p.mask.channels + c;
  const T* grad = static_cast<const T*>(p.grad) + first;
  const T* z = kAct ? static_cast<const T*>(p.z) + first : nullptr;
  const float* bias = kAct && p.bias ? p.bias + c : nullptr;
  T* dx = static_cast<T*>(p.dx) + first;
  const V scale = set(p.mask.scale);
  for_lanes(count, [&](int64_t i, auto lanes) {
    V g = keep(mul(lanes.get(grad + i), scale), kept.from(i));
    if (kAct) {
      const V value = lanes.get(z + i);
      g = activate_grad(kAct, bias ? add(value, lanes.get(bias + i)) : value, g);
    }
    lanes.put(dx + i, g);
    if (sums) store(sums + c + i, add(load(sums + c + i), g));
  });
}

template <class T>
void backward(const DropoutBackward& p) {
  const DropoutMask& m = p.mask;
  const int64_t elements = m.rows * m.channels, pitch = round_up(m.channels, 16);
  // Fixed by the shape alone, so that any number of threads sums in one order.
  const int64_t row_chunks = m.rows < kMostChunks ? m.rows : kMostChunks,
                chunk = ceil_div(m.rows, row_chunks);
  const int64_t chunks = p.dbias ? ceil_div(m.rows, chunk) : ceil_div(elements, kStretch);
  const int64_t unit_elements = p.dbias ? chunk * m.channels : kStretch;
  AlignedBuffer<float> parts(p.dbias ? size_t(chunks * pitch) : 1);
  with_activation(p.act, [&](auto act) {
    parallel_for(chunks, [&](int64_t unit) {
      KeptBits kept(m);
      float* sums = p.dbias ? parts.data() + unit * pitch : nullptr;
      if (sums) std::memset(sums, 0, size_t(pitch) * sizeof(float));
      const int64_t begin = unit * unit_elements,
                    end = begin + unit_elements < elements ? begin + unit_elements : elements;
      for_stretches(m, kept, begin, end, [&](int64_t row, int64_t c, int64_t count) {
        backward_stretch<T, act()>(p, kept, row, c, count, sums);
      });
    });
  });
  if (p.dbias) merge_sum(parts.data(), chunks, m.channels, pitch, p.dbias);
}

void dropout_forward(const DropoutForward& p) {
  by_dtype(p.dtype, &Kernels::dropout_forward, p, [&](auto t) { forward<decltype(t)>(p); });
}
void dropout_backward(const DropoutBackward& p) {
  by_dtype(p.dtype, &Kernels::dropout_backward, p, [&](auto t) { backward<decltype(t)>(p); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_dropout(Kernels& k) {
  k.dropout_forward = dropout_forward;
  k.dropout_backward = dropout_backward;
}
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
