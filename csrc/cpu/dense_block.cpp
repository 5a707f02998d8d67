// Runs a dense block's kernels one after the other. From Python the calls and vectors of a layer cost 0.7 ms,
// forward and backward (DenseNet-121, batch 8, bf16: 42 of 294 ms).
#include "ops/dense_block.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops/activation.h"

namespace fastcnn {
namespace {

const void* channel(const void* data, int64_t index, Dtype dtype) {
  return static_cast<const char*>(data) + index * bytes_of(dtype);
}

// The map that a normalisation is, from the statistics that it takes.
void apply(const DenseNorm& norm, int64_t channels, const float* mean, const float* var) {
  float *scale = norm.applied, *shift = scale + channels, *centre = shift + channels,
        *invstd = centre + channels;
  for (int64_t c = 0; c < channels; ++c) {
    invstd[c] = 1.0f / std::sqrt(var[c] + norm.eps);
    scale[c] = norm.weight ? norm.weight[c] * invstd[c] : invstd[c];
    shift[c] = (norm.bias ? norm.bias[c] : 0.0f) - mean[c] * scale[c];
    centre[c] = mean[c];
  }
}

ScaleShiftAct relu_of(const DenseNorm& norm, int64_t channels) {
  return {norm.applied, norm.applied + channels, kRelu};
}

const float* mean_of(const DenseNorm& norm, int64_t channels) { return norm.applied + 2 * channels; }
const float* invstd_of(const DenseNorm& norm, int64_t channels) { return norm.applied + 3 * channels; }

// Packed weights, each layer's where the one's before were.
class Panels {
 public:
  void* room(int64_t bytes) {
    if (bytes_ < bytes) {
      bytes_ = bytes;
      buffer_ = std::make_unique<AlignedBuffer<char>>(size_t(bytes));
    }
    return buffer_->data();
  }

 private:
  int64_t bytes_ = 0;
  std::unique_ptr<AlignedBuffer<char>> buffer_;
};

// What the forward and the backward of a block's layers have in common.
class Layers {
 public:
  explicit Layers(const DenseBlock& block) : b_(block) {
    grid_.images = b_.images;
    grid_.in_h = grid_.out_h = b_.height;
    grid_.in_w = grid_.out_w = b_.width;
  }

  Conv2dShape shape(const DenseLayer& layer) const {
    Conv2dShape s;
    s.images = b_.images;
    s.channels = layer.middle;
    s.n = b_.growth;
    s.in_h = s.out_h = b_.height;
    s.in_w = s.out_w = b_.width;
    s.kernel_h = s.kernel_w = 3;
    s.pad_h = s.pad_w = 1;
    s.dtype = b_.dtype;
    return s;
  }

  // The 1x1 convolution's weight as [read, middle], or for the data gradient as [middle, read].
  const void* packed(const DenseLayer& layer, int64_t read, bool transposed) {
    MatrixSource m;
    m.k = transposed ? layer.middle : read;
    m.n = transposed ? read : layer.middle;
    m.dtype = layer.weight1.dtype;
    m.data = layer.weight1.data;
    m.stride_k = transposed ? layer.weight1.stride_n : layer.weight1.stride_c;
    m.stride_n = transposed ? layer.weight1.stride_c : layer.weight1.stride_n;
    void* room = panels_.room(kernels().packed_bytes(m.k, m.n, b_.dtype));
    kernels().pack_matrix(m, b_.dtype, room);
    return room;
  }

  const void* packed(const DenseLayer& layer) {
    const Conv2dShape s = shape(layer);
    void* room = panels_.room(kernels().conv2d_packed_bytes(s));
    kernels().conv2d_pack(s, layer.weight2, room);
    return room;
  }

  // mid = the 1x1 convolution of what the layer reads, with `tail` before it is stored; its statistics or
  // not.
  void reduce(const DenseLayer& layer, int64_t read, ScaleShiftAct tail, float* mean, float* var) {
    PointwiseForward p;
    p.grid = grid_;
    p.k = read;
    p.n = layer.middle;
    p.dtype = b_.dtype;
    p.x = {b_.buffer, b_.total()};
    p.prologue = relu_of(layer.norm1, read);
    p.packed_weight = packed(layer, read, false);
    p.epilogue.affine = tail;
    p.epilogue.out = layer.mid;
    p.epilogue.out_ld = layer.middle;
    p.epilogue.mean = mean;
    p.epilogue.var = var;
    kernels().pointwise_forward(p);
  }

 protected:
  const DenseBlock& b_;
  PixelGrid grid_;
  Panels panels_;
};

class Forward : Layers {
 public:
  explicit Forward(const DenseBlockForward& p) : Layers(p.block), p_(p) {}

  void run() {
    if (p_.mean)
      kernels().channel_statistics(
          {b_.pixels(), b_.channels, b_.dtype, {b_.buffer, b_.total()}, p_.mean, p_.var});
    for (size_t i = 0; i < b_.layers.size(); ++i) layer(b_.layers[i], b_.read_by(i));
  }

 private:
  void layer(const DenseLayer& layer, int64_t read) {
    const DenseNorm &norm1 = layer.norm1, &norm2 = layer.norm2;
    apply(norm1, read, norm1.trains ? p_.mean : norm1.mean, norm1.trains ? p_.var : norm1.var);
    if (!norm2.trains) apply(norm2, layer.middle, norm2.mean, norm2.var);
    const ScaleShiftAct second = relu_of(norm2, layer.middle);
    reduce(layer, read, p_.finishes ? second : ScaleShiftAct{}, norm2.trains ? layer.mid_mean : nullptr,
           norm2.trains ? layer.mid_var : nullptr);
    if (norm2.trains) apply(norm2, layer.middle, layer.mid_mean, layer.mid_var);
    grow(layer, read, p_.finishes ? ScaleShiftAct{} : second);
  }

  // The 3x3 convolution into the layer's slice, whose statistics come with it.
  void grow(const DenseLayer& layer, int64_t read, ScaleShiftAct head) {
    Conv2dForward p;
    p.shape = shape(layer);
    p.x = {layer.mid, layer.middle};
    p.prologue = head;
    p.packed_weight = packed(layer);
    p.epilogue.out = static_cast<char*>(b_.buffer) + read * bytes_of(b_.dtype);
    p.epilogue.out_ld = b_.total();
    p.epilogue.mean = p_.mean ? p_.mean + read : nullptr;
    p.epilogue.var = p_.mean ? p_.var + read : nullptr;
    kernels().conv2d_forward(p);
  }

  const DenseBlockForward& p_;
};

// What batch statistics pass on to each channel from all layers that read it: slope * (x - mean) + constant.
class Shares {
 public:
  Shares(int64_t channels, const float* mean, int64_t count)
      : mean_(mean), count_(float(count)), constant_(size_t(channels)), slope_(size_t(channels)) {}

  void add(const DenseNorm& norm, int64_t channels, const float* sums) {
    const float *scale = norm.applied, *invstd = invstd_of(norm, channels);
    for (int64_t c = 0; c < channels; ++c) {
      constant_[size_t(c)] -= sums[c] * scale[c] / count_;
      slope_[size_t(c)] -= sums[channels + c] * (scale[c] * invstd[c] * invstd[c]) / count_;
    }
  }

  // coef [4, channels] of a gradient prologue; null where there are no shares.
  const float* coefficients(int64_t first, int64_t channels) {
    if (!mean_) return nullptr;
    coef_.assign(size_t(channels), 1.0f);
    coef_.insert(coef_.end(), slope_.begin() + first, slope_.begin() + first + channels);
    coef_.insert(coef_.end(), mean_ + first, mean_ + first + channels);
    coef_.insert(coef_.end(), constant_.begin() + first, constant_.begin() + first + channels);
    return coef_.data();
  }

 private:
  const float* mean_;
  float count_;
  std::vector<float> constant_, slope_, coef_;
};

class Backward : Layers {
 public:
  explicit Backward(const DenseBlockBackward& p)
      : Layers(p.block), p_(p), so_far_(p.grad), shares_(b_.total(), p.mean, b_.pixels()) {}

  void run() {
    for (size_t i = b_.layers.size(); i-- > 0;) {
      layer(b_.layers[i], p_.gradients[i], b_.read_by(i));
      so_far_ = {p_.total, b_.total()};
    }
    if (!p_.dx) return;
    AffineActDataGradient p;
    p.pixels = b_.pixels();
    p.channels = b_.channels;
    p.dtype = b_.dtype;
    p.gradient = upstream(0, b_.channels);
    p.dx = p_.dx;
    p.dx_ld = b_.channels;
    kernels().affine_act_data_gradient(p);
  }

 private:
  // The gradient of the buffer's channels from `first` on, complete.
  GradientPrologue upstream(int64_t first, int64_t channels) {
    GradientPrologue g;
    g.coef = shares_.coefficients(first, channels);
    g.grad = {channel(so_far_.data, first, b_.dtype), so_far_.ld};
    if (g.coef) g.y = {channel(b_.buffer, first, b_.dtype), b_.total()};
    return g;
  }

  void layer(const DenseLayer& layer, const DenseLayerGradient& own, int64_t read) {
    if (p_.repeats) reduce(layer, read, {}, nullptr, nullptr);
    convolution(layer, own, read);
    product(layer, own, read);
    if (own.dscale2) scale_gradient(layer.norm2, layer.middle, own.sums2, own.dscale2);
    if (own.dscale1) scale_gradient(layer.norm1, read, own.sums1, own.dscale1);
    if (layer.norm1.trains) shares_.add(layer.norm1, read, own.sums1);
  }

  // The 3x3 convolution's: dmid, before the second normalisation.
  void convolution(const DenseLayer& layer, const DenseLayerGradient& own, int64_t read) {
    Conv2dBackward p;
    p.shape = shape(layer);
    p.gradient = upstream(read, b_.growth);
    p.input = {
        {layer.mid, layer.middle}, relu_of(layer.norm2, layer.middle), mean_of(layer.norm2, layer.middle)};
    p.weight = layer.weight2;
    p.output.dx = p_.dmid;
    p.output.dx_ld = layer.middle;
    p.output.dw = own.dweight2;
    p.output.sums = own.sums2;
    p.dw_layout = own.dweight2_layout;
    kernels().conv2d_backward(p);
  }

  // The 1x1 convolution's, added to what the gradient of its input is so far.
  void product(const DenseLayer& layer, const DenseLayerGradient& own, int64_t read) {
    PointwiseBackward p;
    p.grid = grid_;
    p.k = read;
    p.n = layer.middle;
    p.dtype = b_.dtype;
    p.gradient.grad = {p_.dmid, layer.middle};
    p.gradient.y = {layer.mid, layer.middle};
    p.gradient.coef = coefficients(layer.norm2, layer.middle, own.sums2);
    p.input = {{b_.buffer, b_.total()}, relu_of(layer.norm1, read), mean_of(layer.norm1, read)};
    p.packed_weight = packed(layer, read, true);
    p.output.dx = p_.total;
    p.output.dx_ld = b_.total();
    p.output.dw = own.dweight1;
    p.output.sums = own.sums1;
    p.output.residual = so_far_;
    p.output.scales = true;
    kernels().pointwise_backward(p);
  }

  // coef [4, channels]: dy = scale * (dz - sum(dz) / M - x_hat * sum(dz x_hat) / M), or without the sums if
  // frozen.
  const float* coefficients(const DenseNorm& norm, int64_t channels, const float* sums) {
    const float *scale = norm.applied, *mean = mean_of(norm, channels), *invstd = invstd_of(norm, channels);
    const auto count = float(b_.pixels());
    coef_.assign(size_t(4 * channels), 0.0f);
    std::copy(scale, scale + channels, coef_.begin());
    if (!norm.trains) return coef_.data();
    for (int64_t c = 0; c < channels; ++c) {
      coef_[size_t(channels + c)] = -sums[channels + c] * scale[c] / count * (invstd[c] * invstd[c]);
      coef_[size_t(2 * channels + c)] = mean[c];
      coef_[size_t(3 * channels + c)] = -sums[c] * scale[c] / count;
    }
    return coef_.data();
  }

  static void scale_gradient(const DenseNorm& norm, int64_t channels, const float* sums, float* dscale) {
    const float* invstd = invstd_of(norm, channels);
    for (int64_t c = 0; c < channels; ++c) dscale[c] = sums[channels + c] * invstd[c];
  }

  const DenseBlockBackward& p_;
  Activations so_far_;  // the last layer adds to the output's gradient, the others to what it stored
  Shares shares_;
  std::vector<float> coef_;
};

}  // namespace

void dense_block_forward(const DenseBlockForward& p) { Forward(p).run(); }
void dense_block_backward(const DenseBlockBackward& p) { Backward(p).run(); }

}  // namespace fastcnn
