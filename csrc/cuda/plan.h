// The launchers, and which tiles they use: host arithmetic only, a pure
// function of the shape and the GPU's size.
#pragma once

#include "params.h"

namespace fastcnn::cuda {

constexpr int kThreads = 256;
// The ring that streams pointwise weights: depth of one step, and steps in flight plus one.
constexpr int kProductDepth = 32;
constexpr int kProductStages = 3;
// Per-channel constants of the gradient prologue, in shared memory as [6][cb]: y's scale and shift,
// coef[0..3]. In registers they would be 48 per thread while the weight gradients are held as well.
constexpr int kGradientConstants = 6;
constexpr int kInputConstants = 2;  // of the input prologue, likewise: scale and shift

struct Device {
  int multiprocessors;
  int shared_bytes;  // that one block may ask for: 227 KB on an H100, 163 on an A100, 99 on small ones
};

// A grid of (channel_tiles, slices): block (i, j) works on channels [i
// cb, (i + 1) cb) of pixel tiles j, j + slices, ...
struct DepthwisePlan {
  int cb;                  // channels per block, a multiple of the 16-byte vector
  int tile_h, tile_w;      // positions per tile
  int rows, cols;          // the staged window
  int origin_h, origin_w;  // first position (backward; see depthwise_bwd.cu)
  int tiles_h, tiles_w, tiles;
  int channel_tiles, slices;
  int shared_bytes;
  int64_t workspace;  // floats
};

struct SeparablePlan {
  int m, n;  // the product's tile: pixels and output channels
  int cb;    // channels per depthwise step
  int tile_h, tile_w, strips_w;
  int rows, cols;
  int tiles_h, tiles_w, tiles;
  int k_padded;
  int blocks;
  int a_bytes, window_bytes, table_bytes, shared_bytes;
  int64_t workspace;  // floats
};

// Dropout's memory [rows, channels] as [lines, width]: a line is the fewest rows, `folds`, that whole vectors
// fill. Block (i, j) works on vectors [i vectors, (i + 1) vectors) of lines [j chunk, (j + 1) chunk), and no
// block on what is empty.
struct DropoutPlan {
  int64_t elements, width;
  int folds;
  int vectors;        // of a line, per block
  int stripes;        // of a block's threads, each a line further
  int64_t chunk;      // lines per block
  int tiles;          // of vectors
  int slices;         // of lines
  int64_t workspace;  // floats: [slices][width] where there are sums
};

// Capsules: four neighbouring values of an output capsule are a quad; an output capsule's `quads` are columns
// next to each other.
constexpr int kCapsuleStages = 2;           // of the ring that streams weights
constexpr int kCapsuleRows = 8;             // coordinates of an input capsule in a stage
constexpr int kCapsuleOutputThreads = 512;  // of a block that finishes an image's outputs
constexpr int kCapsuleLanes = 8;            // threads that sum du among themselves

// A pass over the input capsules. Thread (column, group) works on `images` images, block (tile, chunk) on
// `groups` such groups and `chunk` input capsules.
struct CapsulePassPlan {
  int quads, columns;
  int images, groups;
  int tiles;
  int chunk, chunks;
  int staged;  // input capsules whose u is in shared memory at once
  int threads, shared_bytes;

  // Floats from row to row of [images of the block]; neighbouring columns' 16-byte stores then hit different
  // banks.
  constexpr int pitch() const { return groups * images + 4; }
};

// du and dW: thread (input capsule, column) keeps `depth` weights of a quad for all images; block i works on
// input capsules [i capsules, (i + 1) capsules), and on `images` images at a time.
struct CapsuleGradientPlan {
  int depth;
  int stride;  // threads per input capsule: its columns, in whole groups of kCapsuleLanes
  int capsules, images;
  int terms;     // iterations whose coupling coefficients depend on the votes
  bool uniform;  // whether the first iteration, where they do not, counts as well
  int threads, shared_bytes;

  constexpr int lanes() const { return capsules * stride; }
  constexpr int planes() const { return 2 * terms + (uniform ? 1 : 0); }
};

struct CapsuleFwdPlan {
  CapsulePassPlan pass;
  int64_t workspace;  // floats
};

struct CapsuleBwdPlan {
  CapsulePassPlan pass;
  CapsuleGradientPlan gradients;
  int64_t workspace;  // floats
};

// The unrolled kernels: square kernels of 3, 5, 7, square stride 1 or 2, no dilation, multiplier 1. Else 0.
int unrolled_kernel(const Geometry& g);
// Outputs per thread along W.
int forward_strip(const Geometry& g);
int backward_strip(const Geometry& g);

// Throw std::invalid_argument where no tile fits the shared memory.
DepthwisePlan plan_depthwise_fwd(const Geometry& g, int dtype, const Device& device);
DepthwisePlan plan_depthwise_bwd(const Geometry& g, int dtype, const Device& device);
// `m`: only products of so many pixels; 0: whichever is expected to be fastest.
SeparablePlan plan_separable_fwd(const Geometry& g, int channels, int dtype, const Device& device, int m = 0);
// `with_bias`: the columns matter, because a bias is added or its gradient is wanted (`with_sums`).
DropoutPlan plan_dropout(const DropoutMask& mask, int dtype, bool with_bias, bool with_sums,
                         const Device& device);
CapsuleFwdPlan plan_capsule_fwd(const CapsuleShape& shape, const Device& device);
CapsuleBwdPlan plan_capsule_bwd(const CapsuleShape& shape, bool detach, const Device& device);

// Enqueue on the op's stream; throw std::runtime_error with CUDA's message where a launch fails.
void depthwise_fwd(const DepthwiseFwd& op, const DepthwisePlan& plan);
void depthwise_bwd(const DepthwiseBwd& op, const DepthwisePlan& plan);
void separable_fwd(const SeparableFwd& op, const SeparablePlan& plan);
void dropout_fwd(const DropoutFwd& op, const DropoutPlan& plan);
void dropout_bwd(const DropoutBwd& op, const DropoutPlan& plan);
void capsule_fwd(const CapsuleFwd& op, const CapsuleFwdPlan& plan);
void capsule_bwd(const CapsuleBwd& op, const CapsuleBwdPlan& plan);

}  // namespace fastcnn::cuda
