// Convolutions.
#include <optional>

#include "bindings/arguments.h"

namespace fastcnn {
namespace {

// (images, in_h, in_w, out_h, out_w, stride_h, stride_w)
PixelGrid grid(const py::tuple& t) {
  PixelGrid g;
  g.images = t[0].cast<int64_t>();
  g.in_h = t[1].cast<int64_t>();
  g.in_w = t[2].cast<int64_t>();
  g.out_h = t[3].cast<int64_t>();
  g.out_w = t[4].cast<int64_t>();
  g.stride_h = t[5].cast<int>();
  g.stride_w = t[6].cast<int>();
  return g;
}

// (images, channels, multiplier, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h,
// pad_w,
//  dilation_h, dilation_w, dtype)
DepthwiseShape depthwise_shape(const py::tuple& t) {
  DepthwiseShape s;
  int64_t* sizes[] = {&s.images, &s.channels, &s.multiplier, &s.in_h, &s.in_w, &s.out_h, &s.out_w};
  int* geometry[] = {&s.kernel_h, &s.kernel_w, &s.stride_h,   &s.stride_w,
                     &s.pad_h,    &s.pad_w,    &s.dilation_h, &s.dilation_w};
  for (int i = 0; i < 7; ++i) *sizes[i] = t[i].cast<int64_t>();
  for (int i = 0; i < 8; ++i) *geometry[i] = t[7 + i].cast<int>();
  s.dtype = dtype_of(t[15].cast<int>());
  return s;
}

// (images, channels, n, in_h, in_w, out_h, out_w, groups, kernel_h, kernel_w, stride_h, stride_w,
// pad_h, pad_w, dilation_h, dilation_w, dtype)
Conv2dShape conv2d_shape(const py::tuple& t) {
  Conv2dShape s;
  int64_t* sizes[] = {&s.images, &s.channels, &s.n, &s.in_h, &s.in_w, &s.out_h, &s.out_w};
  int* geometry[] = {&s.groups, &s.kernel_h, &s.kernel_w,   &s.stride_h,  &s.stride_w,
                     &s.pad_h,  &s.pad_w,    &s.dilation_h, &s.dilation_w};
  for (int i = 0; i < 7; ++i) *sizes[i] = t[i].cast<int64_t>();
  for (int i = 0; i < 9; ++i) *geometry[i] = t[7 + i].cast<int>();
  s.dtype = dtype_of(t[16].cast<int>());
  return s;
}

void bind_pointwise(py::module_& m) {
  m.def("packed_bytes",
        [](int64_t k, int64_t n, int dtype) { return kernels().packed_bytes(k, n, dtype_of(dtype)); });
  m.def("pack_matrix", [](int64_t k, int64_t n, int source_dtype, Pointer data, int64_t stride_k,
                          int64_t stride_n, int dtype, Pointer packed) {
    MatrixSource source;
    source.k = k;
    source.n = n;
    source.dtype = dtype_of(source_dtype);
    source.data = reinterpret_cast<const void*>(data);
    source.stride_k = stride_k;
    source.stride_n = stride_n;
    const Dtype compute = dtype_of(dtype);
    launch([=, pack = kernels().pack_matrix] { pack(source, compute, reinterpret_cast<void*>(packed)); });
  });
  m.def("pointwise_forward", [](const py::tuple& g, int64_t k, int64_t n, int dtype, Pointer x, int64_t x_ld,
                                const py::tuple& prologue, Pointer packed, const py::tuple& e) {
    PointwiseForward p;
    p.grid = grid(g);
    p.k = k;
    p.n = n;
    p.dtype = dtype_of(dtype);
    p.x = activations(x, x_ld);
    p.prologue = affine(prologue);
    p.packed_weight = reinterpret_cast<const void*>(packed);
    p.epilogue = epilogue(e);
    launch(kernels().pointwise_forward, p);
  });
  m.def("pointwise_backward", [](const py::tuple& g, int64_t k, int64_t n, int dtype, const py::tuple& up,
                                 const py::tuple& input, Pointer packed, const py::tuple& output) {
    PointwiseBackward p;
    p.grid = grid(g);
    p.k = k;
    p.n = n;
    p.dtype = dtype_of(dtype);
    p.gradient = gradient(up);
    p.input = backward_input(input);
    p.packed_weight = reinterpret_cast<const void*>(packed);
    p.output = backward_output(output);
    launch(kernels().pointwise_backward, p);
  });
}

void bind_conv2d(py::module_& m) {
  m.def("conv2d_packed_bytes",
        [](const py::tuple& shape) { return kernels().conv2d_packed_bytes(conv2d_shape(shape)); });
  m.def("conv2d_pack", [](const py::tuple& shape, const py::tuple& weight, Pointer packed) {
    const Conv2dShape s = conv2d_shape(shape);
    const Conv2dWeight w = conv2d_weight(weight);
    launch([=, pack = kernels().conv2d_pack] { pack(s, w, reinterpret_cast<void*>(packed)); });
  });
  m.def("conv2d_forward", [](const py::tuple& shape, Pointer x, int64_t x_ld, const py::tuple& prologue,
                             Pointer packed, const py::tuple& e, const std::optional<py::tuple>& mask) {
    Conv2dForward p{conv2d_shape(shape), activations(x, x_ld), affine(prologue),
                    reinterpret_cast<const void*>(packed), epilogue(e)};
    if (!mask) return launch(kernels().conv2d_forward, p);
    launch([p, own = dropout_mask(*mask), kernel = kernels().conv2d_forward] {
      Conv2dForward masked = p;
      masked.epilogue.mask = &own;
      kernel(masked);
    });
  });
  m.def("conv2d_backward", [](const py::tuple& shape, const py::tuple& up, const py::tuple& input,
                              const py::tuple& weight, const py::tuple& output, const py::tuple& dw_layout) {
    Conv2dBackward p{conv2d_shape(shape),     gradient(up),
                     backward_input(input),   conv2d_weight(weight),
                     backward_output(output), conv2d_weight(dw_layout)};
    launch(kernels().conv2d_backward, p);
  });
}

void bind_depthwise(py::module_& m) {
  m.def("depthwise_forward", [](const py::tuple& shape, Pointer x, int64_t x_ld, const py::tuple& prologue,
                                Pointer weight, const py::tuple& e) {
    DepthwiseForward p;
    p.shape = depthwise_shape(shape);
    p.x = activations(x, x_ld);
    p.prologue = affine(prologue);
    p.weight = floats(weight);
    p.epilogue = epilogue(e);
    launch(kernels().depthwise_forward, p);
  });
  m.def("depthwise_backward", [](const py::tuple& shape, const py::tuple& up, const py::tuple& input,
                                 Pointer weight, const py::tuple& output) {
    DepthwiseBackward p;
    p.shape = depthwise_shape(shape);
    p.gradient = gradient(up);
    p.input = backward_input(input);
    p.weight = floats(weight);
    p.output = backward_output(output);
    launch(kernels().depthwise_backward, p);
  });
}

void bind_fused(py::module_& m) {
  m.def("separable_forward",
        [](const py::tuple& shape, Pointer x, int64_t x_ld, const py::tuple& prologue, Pointer dw_weight,
           const py::tuple& middle, int64_t n, Pointer packed, const py::tuple& e) {
          SeparableForward p;
          p.depthwise = depthwise_shape(shape);
          p.x = activations(x, x_ld);
          p.prologue = affine(prologue);
          p.dw_weight = floats(dw_weight);
          p.middle = affine(middle);
          p.n = n;
          p.packed_pointwise = reinterpret_cast<const void*>(packed);
          p.epilogue = epilogue(e);
          launch(kernels().separable_forward, p);
        });
  m.def("inverted_residual_forward",
        [](int64_t k, const py::tuple& shape, Pointer x, int64_t x_ld, const py::tuple& prologue,
           Pointer packed_expand, const py::tuple& expand, Pointer dw_weight, const py::tuple& middle,
           int64_t n, Pointer packed_project, const py::tuple& e) {
          InvertedResidualForward p;
          p.k = k;
          p.depthwise = depthwise_shape(shape);
          p.x = activations(x, x_ld);
          p.prologue = affine(prologue);
          p.packed_expand = reinterpret_cast<const void*>(packed_expand);
          p.expand = affine(expand);
          p.dw_weight = floats(dw_weight);
          p.middle = affine(middle);
          p.n = n;
          p.packed_project = reinterpret_cast<const void*>(packed_project);
          p.epilogue = epilogue(e);
          launch(kernels().inverted_residual_forward, p);
        });
}

}  // namespace

void bind_convolutions(py::module_& m) {
  bind_pointwise(m);
  bind_conv2d(m);
  bind_depthwise(m);
  bind_fused(m);
}

}  // namespace fastcnn
