// Both gradients of a depthwise convolution for any filter, stride,
// dilation and depth multiplier, in one pass.
//
// The block stages a tile of a = act(scale x + shift) and the window of dy that meets it. For dx a thread
// walks over the taps of one pixel, for dw over the pixels of one tap; each visits only the (pixel, tap)
// pairs that meet an output. dw lives in shared memory, every entry owned by one thread.
#include "depthwise_bwd.cuh"
#include "dispatch.h"

namespace fastcnn::cuda {
namespace {

// Along one axis: pixel h meets tap r at output p = (h + pad - r dil) / stride where that divides.
struct Axis {
  int stride, dil, pad, size;  // size: taps

  // The smallest output that a tile from pixel `start` on may meet.
  FASTCNN_DEVICE int first_output(int start) const {
    const int reach = start + pad - (size - 1) * dil;
    return reach >= 0 ? (reach + stride - 1) / stride : -(-reach / stride);
  }
  // The first tap that meets pixel h at an output, and the number of taps when none does.
  FASTCNN_DEVICE int first_tap(int h) const {
    int r = 0;
    while (r < size && (h + pad - r * dil) % stride != 0) ++r;
    return r;
  }
  // The first pixel at or after `start` that tap r meets.
  FASTCNN_DEVICE int first_pixel(int start, int r) const {
    const int over = (start + pad - r * dil) % stride;
    return over == 0 ? start : start + (over > 0 ? stride - over : -over);
  }
  FASTCNN_DEVICE int output(int h, int r) const { return (h + pad - r * dil) / stride; }
  // Taps between two that meet the same pixel: stride / gcd(stride, dil).
  FASTCNN_DEVICE int tap_step() const {
    int a = stride, b = dil;
    while (b != 0) {
      const int rest = a % b;
      a = b;
      b = rest;
    }
    return stride / a;
  }
};

// What a block holds in shared memory.
template <class T>
struct Shared {
  float *weights, *constants, *dw,
      *dx;    // [tap][cb], the gradient prologue's, [multiplier][tap][cb], [pixel][cb]
  T *dy, *a;  // [row][col][cb], [pixel][cb]

  FASTCNN_DEVICE Shared(const DepthwisePlan& plan, int taps, int multiplier) {
    weights = reinterpret_cast<float*>(dynamic_shared());
    constants = weights + taps * plan.cb;
    dw = constants + kGradientConstants * plan.cb;
    dx = dw + taps * plan.cb * multiplier;
    dy = reinterpret_cast<T*>(dx + plan.tile_h * plan.tile_w * plan.cb);
    a = dy + plan.rows * plan.cols * plan.cb;
  }
};

// The tile's place: its image, first pixel, first output of the dy window, and the pixels that exist.
struct Place {
  int n;
  int h0, w0, p0, q0, rows, cols;
};

template <class T>
FASTCNN_DEVICE void accumulate_dx(const Shared<T>& shared, const DepthwisePlan& plan, const Place& at,
                                  Axis vertical, Axis horizontal) {
  const int cb = plan.cb, step_h = vertical.tap_step(), step_w = horizontal.tap_step();
  for (int i = threadIdx.x; i < at.rows * at.cols * (cb / 2); i += blockDim.x) {
    const int pair = i % (cb / 2), pixel = i / (cb / 2), h = at.h0 + pixel / at.cols,
              w = at.w0 + pixel % at.cols;
    const int first_s = horizontal.first_tap(w);
    float* out = shared.dx + ((h - at.h0) * plan.tile_w + w - at.w0) * cb + 2 * pair;
    float2 sum = load_pair(out);
    for (int r = vertical.first_tap(h); r < vertical.size; r += step_h) {
      const int row = (vertical.output(h, r) - at.p0) * plan.cols - at.q0;
      int q = first_s < horizontal.size ? horizontal.output(w, first_s) : 0;
      for (int s = first_s; s < horizontal.size; s += step_w) {
        const float2 weight = load_pair(shared.weights + (r * horizontal.size + s) * cb + 2 * pair);
        sum = fma(weight, load_pair(shared.dy + (row + q) * cb + 2 * pair), sum);
        q -= step_w * horizontal.dil / horizontal.stride;
      }
    }
    store_pair(out, sum);
  }
}

template <class T>
FASTCNN_DEVICE void accumulate_dw(const Shared<T>& shared, float* dw, const DepthwisePlan& plan,
                                  const Place& at, Axis vertical, Axis horizontal) {
  const int cb = plan.cb, taps = vertical.size * horizontal.size;
  for (int i = threadIdx.x; i < taps * (cb / 2); i += blockDim.x) {
    const int pair = i % (cb / 2), tap = i / (cb / 2), r = tap / horizontal.size, s = tap % horizontal.size;
    float* out = dw + tap * cb + 2 * pair;
    float2 sum = load_pair(out);
    const int first_w = horizontal.first_pixel(at.w0, s);
    for (int h = vertical.first_pixel(at.h0, r); h < at.h0 + at.rows; h += vertical.stride) {
      const T* a = shared.a + ((h - at.h0) * plan.tile_w - at.w0) * cb + 2 * pair;
      const T* dy = shared.dy + ((vertical.output(h, r) - at.p0) * plan.cols - at.q0) * cb + 2 * pair;
      int q = horizontal.output(first_w, s);
      for (int w = first_w; w < at.w0 + at.cols; w += horizontal.stride) {
        sum = fma(load_pair(a + w * cb), load_pair(dy + q * cb), sum);
        ++q;
      }
    }
    store_pair(out, sum);
  }
}

// x through its prologue; every pixel is read once.
template <class T>
FASTCNN_DEVICE void stage_input(T* a, const InputGradient<T>& input, const DepthwisePlan& plan,
                                const Place& at, int pair, int stripe, int stripes) {
  for (int pixel = stripe; stripe < stripes && pixel < at.rows * at.cols; pixel += stripes) {
    const int row = pixel / at.cols, col = pixel % at.cols;
    float2 v = make_float2(0.f, 0.f);
    if (input.count > 0) v = input.activated(input.pixel(at.n, at.h0 + row, at.w0 + col));
    store_pair(a + (row * plan.tile_w + col) * plan.cb + 2 * pair, v);
  }
}

template <class T>
FASTCNN_DEVICE void store_dx(const float* dx, InputGradient<T>& input, const DepthwisePlan& plan,
                             const Place& at, int pair, int stripe, int stripes) {
  for (int pixel = stripe; stripe < stripes && pixel < at.rows * at.cols; pixel += stripes) {
    const int row = pixel / at.cols, col = pixel % at.cols;
    const float2 v = load_pair(dx + (row * plan.tile_w + col) * plan.cb + 2 * pair);
    if (input.count > 0) input.store(v, input.pixel(at.n, at.h0 + row, at.w0 + col));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    depthwise_bwd_generic_kernel(const DepthwiseBwd op, const DepthwisePlan plan, const Access access) {
  const Geometry& g = op.g;
  const int cb = plan.cb, c0 = blockIdx.x * cb, taps = g.r * g.s, multiplier = g.c / g.k;
  const int pair = threadIdx.x % (cb / 2), stripe = threadIdx.x / (cb / 2), stripes = kThreads / (cb / 2);
  const Axis vertical = {g.stride_h, g.dil_h, g.pad_h, g.r}, horizontal = {g.stride_w, g.dil_w, g.pad_w, g.s};
  const Shared<T> shared(plan, taps, multiplier);
  InputGradient<T> input;
  input.read(op, c0 + 2 * pair, access);
  for (int i = threadIdx.x; i < taps * multiplier * cb; i += blockDim.x) shared.dw[i] = 0.f;

  for (int index = blockIdx.y; index < plan.tiles; index += gridDim.y) {
    const int across = index % plan.tiles_w, rest = index / plan.tiles_w;
    const int h0 = rest % plan.tiles_h * plan.tile_h, w0 = across * plan.tile_w;
    const Place at = {rest / plan.tiles_h,
                      h0,
                      w0,
                      vertical.first_output(h0),
                      horizontal.first_output(w0),
                      min(plan.tile_h, g.h - h0),
                      min(plan.tile_w, g.w - w0)};
    for (int i = threadIdx.x; i < plan.tile_h * plan.tile_w * cb; i += blockDim.x) shared.dx[i] = 0.f;
    if (op.dw != nullptr) stage_input(shared.a, input, plan, at, pair, stripe, stripes);
    for (int member = 0; member < multiplier; ++member) {
      __syncthreads();
      stage_filter<T>(shared.weights, op.weight, taps, cb, c0, g.k, multiplier, member);
      GradientLoader<T> loader = gradient_loader<T>(op, c0, cb, member, access, shared.constants);
      loader.stage_constants();
      __syncthreads();
      const Window window = {at.n, g.p, g.q, at.p0, at.q0, plan.rows, plan.cols};
      stage(shared.dy, window, cb, loader);
      __syncthreads();
      if (op.dx.data != nullptr) accumulate_dx(shared, plan, at, vertical, horizontal);
      if (op.dw != nullptr) {
        accumulate_dw(shared, shared.dw + member * taps * cb, plan, at, vertical, horizontal);
      }
    }
    __syncthreads();
    if (op.dx.data != nullptr) store_dx(shared.dx, input, plan, at, pair, stripe, stripes);
    __syncthreads();
  }
  if (op.dw != nullptr) {
    float* partials = op.workspace + int64_t(blockIdx.y) * taps * g.c;
    for (int i = threadIdx.x; i < taps * multiplier * cb; i += blockDim.x) {
      const int c = c0 + i % cb, tap = i / cb % taps, member = i / cb / taps;
      if (c < g.k) partials[int64_t(tap) * g.c + c * multiplier + member] = shared.dw[i];
    }
  }
  if (op.sums != nullptr) {
    store_block_sums(shared.dx, input.sums, pair, stripe, stripes, cb, sums_partials(op, plan, blockIdx.y),
                     g.k, c0);
  }
}

}  // namespace

void launch_depthwise_bwd_generic(const DepthwiseBwd& op, const DepthwisePlan& plan, const Access& access) {
  with_dtype(op.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("depthwise_bwd_generic", depthwise_bwd_generic_kernel<T>, dim3(plan.channel_tiles, plan.slices),
           kThreads, plan.shared_bytes, op.stream, op, plan, access);
  });
}

}  // namespace fastcnn::cuda
