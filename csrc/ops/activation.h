// The activations' wire codes, the same on every backend (fastcnn/ops/activations.py).
#pragma once

namespace fastcnn {

enum Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2, kSilu = 3, kHardswish = 4 };

// Added to an epilogue's activation that comes after the residual.
constexpr int kAfterResidual = 8;

}  // namespace fastcnn
