// The table of one instruction set's kernels, and how the active one is chosen.
#pragma once

#include <cstdint>

#include "ops/affine_act.h"
#include "ops/avg_pool2d.h"
#include "ops/capsule.h"
#include "ops/conv2d.h"
#include "ops/depthwise.h"
#include "ops/dropout.h"
#include "ops/local_response_norm.h"
#include "ops/max_pool2d.h"
#include "ops/pointwise.h"
#include "ops/separable.h"

namespace fastcnn {

// Filled by register_<op> of each per-instruction-set source.
struct Kernels {
  int64_t (*packed_bytes)(int64_t k, int64_t n, Dtype compute) = nullptr;
  void (*pack_matrix)(const MatrixSource&, Dtype compute, void* packed) = nullptr;
  void (*pointwise_forward)(const PointwiseForward&) = nullptr;
  void (*pointwise_backward)(const PointwiseBackward&) = nullptr;
  int64_t (*conv2d_packed_bytes)(const Conv2dShape&) = nullptr;
  void (*conv2d_pack)(const Conv2dShape&, const Conv2dWeight&, void* packed) = nullptr;
  void (*conv2d_forward)(const Conv2dForward&) = nullptr;
  void (*conv2d_backward)(const Conv2dBackward&) = nullptr;
  // conv2d in groups of four or eight channels (group_stencil.h).
  void (*group_pack)(const Conv2dShape&, const Conv2dWeight&, void* packed) = nullptr;
  void (*group_forward)(const Conv2dForward&) = nullptr;
  void (*group_data_gradient)(const Conv2dBackward&) = nullptr;
  void (*group_weight_gradient)(const Conv2dBackward&) = nullptr;
  void (*depthwise_forward)(const DepthwiseForward&) = nullptr;
  void (*depthwise_backward)(const DepthwiseBackward&) = nullptr;
  void (*separable_forward)(const SeparableForward&) = nullptr;
  void (*inverted_residual_forward)(const InvertedResidualForward&) = nullptr;
  void (*max_pool2d_forward)(const MaxPool2dForward&) = nullptr;
  void (*max_pool2d_backward)(const MaxPool2dBackward&) = nullptr;
  void (*avg_pool2d_forward)(const AvgPool2dForward&) = nullptr;
  void (*avg_pool2d_backward)(const AvgPool2dBackward&) = nullptr;
  void (*local_response_norm)(const LocalResponseNorm&) = nullptr;
  void (*affine_act_forward)(const AffineActForward&) = nullptr;
  void (*affine_act_sums)(const AffineActSums&) = nullptr;
  void (*affine_act_data_gradient)(const AffineActDataGradient&) = nullptr;
  void (*residual_act_backward)(const ResidualActBackward&) = nullptr;
  void (*channel_statistics)(const ChannelStatistics&) = nullptr;
  void (*dropout_forward)(const DropoutForward&) = nullptr;
  void (*dropout_backward)(const DropoutBackward&) = nullptr;
  void (*squash)(const Squash&) = nullptr;
  void (*capsule_forward)(const CapsuleForward&) = nullptr;
  void (*capsule_backward)(const CapsuleBackward&) = nullptr;
};

const Kernels& kernels();         // of the active instruction set
const Kernels& avx512_kernels();  // of that one

int isa_count();
const char* isa_name(int index);  // compiled in, oldest first
bool isa_supported(int index);    // by this processor and operating system
int isa_active();
void isa_activate(int index);  // throws std::runtime_error if unsupported

}  // namespace fastcnn
