// Inverted dropout, forward and backward: one pass over memory, the mask drawn on the way.
//
// A thread keeps its vector of columns from line to line (plan_dropout.cpp), and with it its channels: a bias
// and the sums for its gradient stay in registers, no index is divided for, and a line's vectors are aligned
// whatever the number of channels. Where the rows of a sample share their draws, so do a thread's lines.
//
// Floor: x read once, out written once (4 bytes per 16-bit element), so 3.0 TB/s allow an H100 3.3 elements
// per cycle and multiprocessor. Issue allows 4.3 by sm_90's code: 240 instructions for 8 elements with a draw
// each, 100 of them Philox's.
#include <type_traits>

#include "dispatch.h"
#include "philox.cuh"
#include "prologue_epilogue.cuh"
#include "reduce.h"

namespace fastcnn::cuda {
namespace {

// A thread's vectors: [first, first + N) in one line, and so on every `stripes` lines, below `end`.
template <int N>
struct Vectors {
  int vector, stripe;  // of the block's
  int64_t first, end, step, elements;

  FASTCNN_DEVICE explicit Vectors(const DropoutPlan& plan)
      : vector(threadIdx.x % plan.vectors),
        stripe(threadIdx.x / plan.vectors),
        step(plan.stripes * plan.width),
        elements(plan.elements) {
    const int64_t column = (int64_t(blockIdx.x) * plan.vectors + vector) * N, lines = blockIdx.y * plan.chunk;
    first = (lines + stripe) * plan.width + column;
    end = min((lines + plan.chunk) * plan.width, elements);
    if (stripe >= plan.stripes || column >= plan.width) end = 0;  // a thread that is left over
  }

  // function(first element, elements)
  template <class Function>
  FASTCNN_DEVICE void for_each(Function function) const {
    for (int64_t i = first; i < end; i += step) function(i, int(min(elements - i, int64_t(N))));
  }
};

// Which of a thread's N elements stay.
template <int kUnit, int N>
class Kept {
 public:
  FASTCNN_DEVICE explicit Kept(const DropoutMask& m)
      : mask_(m), philox_(m.seed), threshold_(uint32_t(m.threshold)), none_(m.threshold >> 32 != 0) {}

  // What elements share, for the vector from element `first` on. A thread's channels never change, so what is
  // drawn holds for its next vectors too, up to the end of the sample.
  FASTCNN_DEVICE void draw_shared(int64_t first) {
    if (kUnit == kDropElement || first < until_) return;
    const int64_t row = first / mask_.channels, sample = row / mask_.rows_per_sample;
    const int64_t end = (sample + 1) * mask_.rows_per_sample * mask_.channels;
    const bool one = first + N <= end;
    if (one) until_ = end - N + 1;
    // Its seed is read again: between the rare draws, registers are dearer.
    const Philox philox(mask_.seed);
    if (one && kUnit == kDropSample) {
      bits_ = stays(word(philox(uint64_t(sample) / 4), int(sample % 4))) ? ~0u : 0u;
    } else {
      draw_each(philox, row, first - row * mask_.channels, sample);
    }
  }

  // What is each element's own; `first` is a multiple of N.
  FASTCNN_DEVICE void draw_own(int64_t first) {
    if (kUnit != kDropElement) return;
    bits_ = 0;
#pragma unroll
    for (int i = 0; i < N; i += 4) bits_ |= four(philox_(uint64_t(first + i) / 4)) << i;
  }

  FASTCNN_DEVICE bool operator[](int i) const { return bits_ >> i & 1; }

 private:
  FASTCNN_DEVICE bool stays(uint32_t draw) const { return !none_ && draw >= threshold_; }
  FASTCNN_DEVICE uint32_t four(uint4 w) const {
    return uint32_t(stays(w.x)) | uint32_t(stays(w.y)) << 1 | uint32_t(stays(w.z)) << 2 |
           uint32_t(stays(w.w)) << 3;
  }
  // An array that is indexed at run time would not be in registers.
  static FASTCNN_DEVICE uint32_t word(uint4 w, int i) {
    const uint32_t even = i & 2 ? w.z : w.x, odd = i & 2 ? w.w : w.y;
    return i & 1 ? odd : even;
  }
  // For a vector of several samples, or of channels whose draws need not begin a counter's four.
  FASTCNN_DEVICE void draw_each(const Philox& philox, int64_t row, int64_t channel, int64_t sample) {
    int64_t counter = -1;
    uint4 words = make_uint4(0, 0, 0, 0);
    bits_ = 0;
#pragma unroll 1
    for (int i = 0; i < N; ++i) {
      const int64_t draw = kUnit == kDropChannel ? sample * mask_.channels + channel : sample;
      if (draw / 4 != counter) {
        counter = draw / 4;
        words = philox(uint64_t(counter));
      }
      bits_ |= uint32_t(stays(word(words, int(draw % 4)))) << i;
      if (++channel == mask_.channels) {
        channel = 0;
        sample = ++row / mask_.rows_per_sample;
      }
    }
  }

  const DropoutMask& mask_;
  const Philox philox_;
  const uint32_t threshold_;
  const bool none_;
  uint32_t bits_ = 0;
  int64_t until_ = 0;
};

// The bias of the N channels from an element's on.
template <int N>
struct Bias {
  float at[N];

  FASTCNN_DEVICE Bias(const float* bias, int64_t first, int64_t channels) {
    int64_t channel = bias == nullptr ? 0 : first % channels;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      at[i] = bias == nullptr ? 0.f : __ldg(bias + channel);
      channel = channel + 1 == channels ? 0 : channel + 1;
    }
  }
};

// function(the activation as a constant): one decision for all elements of a vector.
template <class Function>
FASTCNN_DEVICE void with_activation(int act, Function function) {
  switch (act) {
    case kRelu:
      return function(std::integral_constant<int, kRelu>());
    case kRelu6:
      return function(std::integral_constant<int, kRelu6>());
    case kSilu:
      return function(std::integral_constant<int, kSilu>());
    case kHardswish:
      return function(std::integral_constant<int, kHardswish>());
  }
}

template <class T, int kUnit>
__global__ void __launch_bounds__(kThreads, 4)
    dropout_fwd_kernel(const DropoutFwd op, const DropoutPlan plan, const bool aligned) {
  constexpr int N = kVec<T>;
  const Vectors<N> vectors(plan);
  const Bias<N> bias(op.bias, vectors.first, op.mask.channels);
  Kept<kUnit, N> kept(op.mask);
  vectors.for_each([&](int64_t first, int count) {
    // Shared draws, which are rare, while registers are free; own ones in the time that the loads take.
    kept.draw_shared(first);
    const Vector<T> x = load_vector<T, true>(static_cast<const T*>(op.x) + first, count, aligned);
    Vector<T> residual;
    if (op.residual != nullptr) {
      residual = load_vector(static_cast<const T*>(op.residual) + first, count, aligned);
    }
    kept.draw_own(first);
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(x.at[i]) + bias.at[i];
    with_activation(op.act, [&](auto act) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] = activate(v[i], act.value);
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = kept[i] ? v[i] * op.mask.scale : 0.f;
      if (op.residual != nullptr) v[i] += to_float(residual.at[i]);
    }
    store_vector(static_cast<T*>(op.out) + first, v, count, aligned);
  });
}

// Sums over the block's stripes into the block's columns of partials [width].
template <int N>
FASTCNN_DEVICE void store_column_sums(float* shared, const float (&sums)[N], const Vectors<N>& vectors,
                                      const DropoutPlan& plan, float* partials) {
  const int columns = plan.vectors * N;
  if (vectors.stripe < plan.stripes) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[vectors.stripe * columns + vectors.vector * N + i] = sums[i];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < columns; i += kThreads) {
    const int64_t column = int64_t(blockIdx.x) * columns + i;
    float sum = 0.f;
    for (int j = 0; j < plan.stripes; ++j) sum += shared[j * columns + i];
    if (column < plan.width) partials[column] = sum;
  }
}

template <class T, int kUnit>
__global__ void __launch_bounds__(kThreads, 4)
    dropout_bwd_kernel(const DropoutBwd op, const DropoutPlan plan, const bool aligned) {
  constexpr int N = kVec<T>;
  const Vectors<N> vectors(plan);
  const Bias<N> bias(op.act == kNone ? nullptr : op.bias, vectors.first, op.mask.channels);
  Kept<kUnit, N> kept(op.mask);
  float sums[N] = {};
  vectors.for_each([&](int64_t first, int count) {
    kept.draw_shared(first);
    const Vector<T> grad = load_vector<T, true>(static_cast<const T*>(op.grad) + first, count, aligned);
    Vector<T> z;
    if (op.act != kNone) z = load_vector(static_cast<const T*>(op.z) + first, count, aligned);
    kept.draw_own(first);
    float v[N];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(grad.at[i]) * op.mask.scale;
    with_activation(op.act, [&](auto act) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] *= activation_derivative(to_float(z.at[i]) + bias.at[i], act.value);
    });
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = kept[i] ? v[i] : 0.f;
      sums[i] += v[i];
    }
    store_vector(static_cast<T*>(op.dx) + first, v, count, aligned);
  });
  if (op.dbias != nullptr) {
    store_column_sums(reinterpret_cast<float*>(dynamic_shared()), sums, vectors, plan,
                      op.workspace + blockIdx.y * plan.width);
  }
}

template <class Function>
void with_unit(int unit, Function function) {
  switch (unit) {
    case kDropElement:
      return function(std::integral_constant<int, kDropElement>());
    case kDropChannel:
      return function(std::integral_constant<int, kDropChannel>());
    case kDropSample:
      return function(std::integral_constant<int, kDropSample>());
  }
  throw std::invalid_argument("dropout: expected a unit of 0 (element), 1 (channel) or 2 (sample)");
}

// function(Type<T>, the unit as a constant) where there is something to do.
template <class Function>
void with_kernel(const DropoutMask& mask, int dtype, const DropoutPlan& plan, Function function) {
  if (plan.slices == 0) return;
  with_dtype(dtype, [&](auto type) { with_unit(mask.unit, [&](auto unit) { function(type, unit); }); });
}

template <class... Pointers>
bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % sizeof(uint4) == 0) && ...);
}

}  // namespace

void dropout_fwd(const DropoutFwd& op, const DropoutPlan& plan) {
  with_kernel(op.mask, op.dtype, plan, [&](auto type, auto unit) {
    launch("dropout_fwd", dropout_fwd_kernel<typename decltype(type)::type, decltype(unit)::value>,
           dim3(plan.tiles, plan.slices), kThreads, 0, op.stream, op, plan,
           are_aligned(op.x, op.residual, op.out));
  });
}

void dropout_bwd(const DropoutBwd& op, const DropoutPlan& plan) {
  const size_t shared_bytes =
      op.dbias != nullptr ? size_t(kThreads) * 16 / element_size(op.dtype) * sizeof(float) : 0;
  with_kernel(op.mask, op.dtype, plan, [&](auto type, auto unit) {
    launch("dropout_bwd", dropout_bwd_kernel<typename decltype(type)::type, decltype(unit)::value>,
           dim3(plan.tiles, plan.slices), kThreads, shared_bytes, op.stream, op, plan,
           are_aligned(op.grad, op.act == kNone ? nullptr : op.z, op.dx));
  });
  if (op.dbias != nullptr) {
    sum_partials(op.workspace, plan.slices * plan.folds, 1, int(op.mask.channels), false, op.dbias,
                 op.stream);
  }
}

}  // namespace fastcnn::cuda
