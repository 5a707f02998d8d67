// A dense block in one NHWC buffer, all its layers (fastcnn/ops/dense_block.py has the formulas).
#pragma once

#include <cstddef>
#include <vector>

#include "ops/conv2d.h"
#include "ops/pointwise.h"

namespace fastcnn {

// A BatchNorm before a ReLU. A null weight is 1, a null bias 0; mean and var are the running ones unless it
// trains.
struct DenseNorm {
  const float* weight = nullptr;
  const float* bias = nullptr;
  const float* mean = nullptr;
  const float* var = nullptr;
  float eps = 0;
  bool trains = false;
  float* applied = nullptr;  // [4, channels]: scale, shift, mean, 1 / deviation; the forward writes them
};

// Layer l reads the buffer's first channels + l * growth channels.
struct DenseLayer {
  DenseNorm norm1;
  Conv2dWeight weight1;  // [middle, channels read, 1, 1]
  DenseNorm norm2;
  Conv2dWeight weight2;  // [growth, middle, 3, 3]
  int64_t middle = 0;
  void* mid = nullptr;        // [pixels, middle], the 1x1 convolution's output
  float* mid_mean = nullptr;  // batch statistics of it, where norm2 trains
  float* mid_var = nullptr;
};

struct DenseBlock {
  int64_t images = 0, height = 0, width = 0;
  int64_t channels = 0, growth = 0;  // of the input, and of each layer's slice
  Dtype dtype = kFloat32;
  void* buffer = nullptr;  // [pixels, total()]
  std::vector<DenseLayer> layers;

  int64_t pixels() const { return images * height * width; }
  int64_t read_by(size_t layer) const { return channels + int64_t(layer) * growth; }
  int64_t total() const { return read_by(layers.size()); }
};

struct DenseBlockForward {
  DenseBlock block;
  float* mean = nullptr;  // [total()] with var: batch statistics of the buffer, where a norm1 trains
  float* var = nullptr;
  bool finishes = false;  // mid is stored normalised and activated; norm2 is frozen everywhere
};

// Null is not asked for; sums, of [2, channels], are where the gradients of weight and bias come from.
struct DenseLayerGradient {
  float* dweight1 = nullptr;
  float* sums1 = nullptr;
  float* dscale1 = nullptr;
  float* dweight2 = nullptr;
  Conv2dWeight dweight2_layout;
  float* sums2 = nullptr;
  float* dscale2 = nullptr;
};

struct DenseBlockBackward {
  DenseBlock block;
  const float* mean = nullptr;  // of the forward
  bool repeats = false;         // mid holds nothing yet: the 1x1 convolutions run again
  std::vector<DenseLayerGradient> gradients;
  Activations grad;       // the output's gradient, which is not written to
  void* total = nullptr;  // [pixels, block.total()], room for its sum with what the layers add
  void* dmid = nullptr;   // [pixels, the widest middle], room
  void* dx = nullptr;     // [pixels, channels] or null
};

void dense_block_forward(const DenseBlockForward&);
void dense_block_backward(const DenseBlockBackward&);

}  // namespace fastcnn
