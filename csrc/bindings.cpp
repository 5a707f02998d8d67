// Python in, plain structs out; nothing else. Pointers come as integers, 0 is null.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "ops/activation.h"

#ifdef FASTCNN_WITH_CUDA
namespace fastcnn::cuda {
void bind(pybind11::module_& m);
}
#endif

namespace py = pybind11;
using namespace fastcnn;
using Pointer = uintptr_t;

namespace {

const float* floats(Pointer p) { return reinterpret_cast<const float*>(p); }
float* mutable_floats(Pointer p) { return reinterpret_cast<float*>(p); }
Activations activations(Pointer p, int64_t ld) { return {reinterpret_cast<const void*>(p), ld}; }

Dtype dtype_of(int code) {
  if (code != kFloat32 && code != kBfloat16)
    throw py::value_error("dtype: got " + std::to_string(code) + ", expected 0 (float32) or 1 (bfloat16)");
  return static_cast<Dtype>(code);
}

// (scale, shift, act)
ScaleShiftAct affine(const py::tuple& t) {
  return {floats(t[0].cast<Pointer>()), floats(t[1].cast<Pointer>()), t[2].cast<int>()};
}

// (scale, shift, act, residual, residual_ld, out, out_ld, mean, var)
Epilogue epilogue(const py::tuple& t) {
  Epilogue e;
  e.affine = affine(t);
  e.act_last = e.affine.act & kAfterResidual;
  e.affine.act &= ~kAfterResidual;
  e.residual = activations(t[3].cast<Pointer>(), t[4].cast<int64_t>());
  e.out = reinterpret_cast<void*>(t[5].cast<Pointer>());
  e.out_ld = t[6].cast<int64_t>();
  e.mean = mutable_floats(t[7].cast<Pointer>());
  e.var = mutable_floats(t[8].cast<Pointer>());
  return e;
}

// (grad, grad_ld, y, y_ld, scale, shift, act, coef)
GradientPrologue gradient(const py::tuple& t) {
  GradientPrologue g;
  g.grad = activations(t[0].cast<Pointer>(), t[1].cast<int64_t>());
  g.y = activations(t[2].cast<Pointer>(), t[3].cast<int64_t>());
  g.affine = {floats(t[4].cast<Pointer>()), floats(t[5].cast<Pointer>()), t[6].cast<int>()};
  g.coef = floats(t[7].cast<Pointer>());
  return g;
}

// (x, x_ld, scale, shift, act, mean)
BackwardInput backward_input(const py::tuple& t) {
  BackwardInput b;
  b.x = activations(t[0].cast<Pointer>(), t[1].cast<int64_t>());
  b.affine = {floats(t[2].cast<Pointer>()), floats(t[3].cast<Pointer>()), t[4].cast<int>()};
  b.mean = floats(t[5].cast<Pointer>());
  return b;
}

// (dx, dx_ld, dw, sums, residual, residual_ld)
BackwardOutput backward_output(const py::tuple& t) {
  BackwardOutput o;
  o.dx = reinterpret_cast<void*>(t[0].cast<Pointer>());
  o.dx_ld = t[1].cast<int64_t>();
  o.dw = mutable_floats(t[2].cast<Pointer>());
  o.sums = mutable_floats(t[3].cast<Pointer>());
  o.residual = activations(t[4].cast<Pointer>(), t[5].cast<int64_t>());
  return o;
}

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

// (data, dtype, stride_n, stride_c, stride_h, stride_w)
Conv2dWeight conv2d_weight(const py::tuple& t) {
  return {reinterpret_cast<const void*>(t[0].cast<Pointer>()),
          dtype_of(t[1].cast<int>()),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<int64_t>()};
}

template <class Parameters>
void launch(void (*kernel)(const Parameters&), const Parameters& parameters) {
  py::gil_scoped_release release;
  kernel(parameters);
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
    py::gil_scoped_release release;
    kernels().pack_matrix(source, dtype_of(dtype), reinterpret_cast<void*>(packed));
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
    py::gil_scoped_release release;
    kernels().conv2d_pack(s, w, reinterpret_cast<void*>(packed));
  });
  m.def("conv2d_forward", [](const py::tuple& shape, Pointer x, int64_t x_ld, const py::tuple& prologue,
                             Pointer packed, const py::tuple& e) {
    Conv2dForward p{conv2d_shape(shape), activations(x, x_ld), affine(prologue),
                    reinterpret_cast<const void*>(packed), epilogue(e)};
    launch(kernels().conv2d_forward, p);
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

void bind_affine_act(py::module_& m) {
  m.def("affine_act_forward",
        [](int64_t pixels, int64_t channels, int dtype, Pointer y, int64_t y_ld, const py::tuple& e) {
          AffineActForward p{pixels, channels, dtype_of(dtype), activations(y, y_ld), epilogue(e)};
          launch(kernels().affine_act_forward, p);
        });
  m.def("affine_act_sums", [](int64_t pixels, int64_t channels, int dtype, Pointer grad, int64_t grad_ld,
                              Pointer y, int64_t y_ld, const py::tuple& a, Pointer mean, Pointer sums) {
    AffineActSums p{
        pixels,    channels,     dtype_of(dtype),     activations(grad, grad_ld), activations(y, y_ld),
        affine(a), floats(mean), mutable_floats(sums)};
    launch(kernels().affine_act_sums, p);
  });
  m.def("affine_act_data_gradient", [](int64_t pixels, int64_t channels, int dtype, const py::tuple& up,
                                       Pointer residual, int64_t residual_ld, Pointer dx, int64_t dx_ld) {
    AffineActDataGradient p{pixels,
                            channels,
                            dtype_of(dtype),
                            gradient(up),
                            activations(residual, residual_ld),
                            reinterpret_cast<void*>(dx),
                            dx_ld};
    launch(kernels().affine_act_data_gradient, p);
  });
  m.def("residual_act_backward", [](int64_t pixels, int64_t channels, int dtype, Pointer grad,
                                    int64_t grad_ld, Pointer out, int64_t out_ld, int act, Pointer y,
                                    int64_t y_ld, Pointer mean, Pointer dz, int64_t dz_ld, Pointer sums) {
    ResidualActBackward p{pixels,
                          channels,
                          dtype_of(dtype),
                          activations(grad, grad_ld),
                          activations(out, out_ld),
                          act,
                          activations(y, y_ld),
                          floats(mean),
                          reinterpret_cast<void*>(dz),
                          dz_ld,
                          mutable_floats(sums)};
    launch(kernels().residual_act_backward, p);
  });
  m.def("channel_statistics", [](int64_t pixels, int64_t channels, int dtype, Pointer x, int64_t x_ld,
                                 Pointer mean, Pointer var) {
    ChannelStatistics p{
        pixels, channels, dtype_of(dtype), activations(x, x_ld), mutable_floats(mean), mutable_floats(var)};
    launch(kernels().channel_statistics, p);
  });
}

// (images, channels, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dtype)
MaxPool2dForward max_pool2d_geometry(const py::tuple& t) {
  MaxPool2dForward p;
  int64_t* sizes[] = {&p.images, &p.channels, &p.in_h, &p.in_w, &p.out_h, &p.out_w};
  int* geometry[] = {&p.kernel_h, &p.kernel_w, &p.stride_h, &p.stride_w, &p.pad_h, &p.pad_w};
  for (int i = 0; i < 6; ++i) *sizes[i] = t[i].cast<int64_t>();
  for (int i = 0; i < 6; ++i) *geometry[i] = t[6 + i].cast<int>();
  p.dtype = dtype_of(t[12].cast<int>());
  return p;
}

void bind_max_pool2d(py::module_& m) {
  m.def("max_pool2d_forward",
        [](const py::tuple& shape, Pointer x, int64_t x_ld, Pointer out, int64_t out_ld, Pointer index) {
          MaxPool2dForward p = max_pool2d_geometry(shape);
          p.x = activations(x, x_ld);
          p.out = reinterpret_cast<void*>(out);
          p.out_ld = out_ld;
          p.index = reinterpret_cast<uint8_t*>(index);
          launch(kernels().max_pool2d_forward, p);
        });
  m.def("max_pool2d_backward",
        [](const py::tuple& shape, Pointer grad, int64_t grad_ld, Pointer index, Pointer dx, int64_t dx_ld) {
          MaxPool2dBackward p;
          p.geometry = max_pool2d_geometry(shape);
          p.grad = activations(grad, grad_ld);
          p.index = reinterpret_cast<const uint8_t*>(index);
          p.dx = reinterpret_cast<void*>(dx);
          p.dx_ld = dx_ld;
          launch(kernels().max_pool2d_backward, p);
        });
}

// (rows, channels, rows_per_sample, unit, threshold, scale, seed), seed: where the 64-bit seed and offset are
DropoutMask dropout_mask(const py::tuple& t) {
  DropoutMask m;
  m.rows = t[0].cast<int64_t>();
  m.channels = t[1].cast<int64_t>();
  m.rows_per_sample = t[2].cast<int64_t>();
  m.unit = t[3].cast<int>();
  m.threshold = t[4].cast<uint64_t>();
  m.scale = t[5].cast<float>();
  const auto* seed = reinterpret_cast<const uint64_t*>(t[6].cast<Pointer>());
  m.seed = seed[0];
  m.offset = seed[1];
  return m;
}

void bind_dropout(py::module_& m) {
  m.def("dropout_forward", [](const py::tuple& mask, int dtype, Pointer x, Pointer bias, int act,
                              Pointer residual, Pointer out) {
    DropoutForward p{dropout_mask(mask),
                     dtype_of(dtype),
                     reinterpret_cast<const void*>(x),
                     floats(bias),
                     act,
                     reinterpret_cast<const void*>(residual),
                     reinterpret_cast<void*>(out)};
    launch(kernels().dropout_forward, p);
  });
  m.def("dropout_backward", [](const py::tuple& mask, int dtype, Pointer grad, Pointer z, Pointer bias,
                               int act, Pointer dx, Pointer dbias) {
    DropoutBackward p{dropout_mask(mask),
                      dtype_of(dtype),
                      reinterpret_cast<const void*>(grad),
                      reinterpret_cast<const void*>(z),
                      floats(bias),
                      act,
                      reinterpret_cast<void*>(dx),
                      mutable_floats(dbias)};
    launch(kernels().dropout_backward, p);
  });
}

// (batch, in_caps, in_dim, out_caps, out_dim, iterations, leaky, dtype)
CapsuleShape capsule_shape(const py::tuple& t) {
  CapsuleShape s;
  int64_t* sizes[] = {&s.batch, &s.in_caps, &s.in_dim, &s.out_caps, &s.out_dim};
  for (int i = 0; i < 5; ++i) *sizes[i] = t[i].cast<int64_t>();
  s.iterations = t[5].cast<int>();
  s.leaky = t[6].cast<bool>();
  s.dtype = dtype_of(t[7].cast<int>());
  return s;
}

void bind_capsules(py::module_& m) {
  m.def("squash", [](int64_t rows, int64_t dim, int dtype, Pointer s, Pointer grad, Pointer out) {
    Squash p{rows,
             dim,
             dtype_of(dtype),
             reinterpret_cast<const void*>(s),
             reinterpret_cast<const void*>(grad),
             reinterpret_cast<void*>(out)};
    launch(kernels().squash, p);
  });
  m.def("capsule_forward",
        [](const py::tuple& shape, Pointer u, Pointer weight, Pointer bias, Pointer v, Pointer s) {
          CapsuleForward p{capsule_shape(shape), reinterpret_cast<const void*>(u), floats(weight),
                           floats(bias),         reinterpret_cast<void*>(v),       mutable_floats(s)};
          launch(kernels().capsule_forward, p);
        });
  m.def("capsule_backward", [](const py::tuple& shape, bool detach, Pointer grad, Pointer u, Pointer weight,
                               Pointer s, Pointer du, Pointer dw, Pointer dbias) {
    CapsuleBackward p{capsule_shape(shape),
                      detach,
                      reinterpret_cast<const void*>(grad),
                      reinterpret_cast<const void*>(u),
                      floats(weight),
                      floats(s),
                      reinterpret_cast<void*>(du),
                      mutable_floats(dw),
                      mutable_floats(dbias)};
    launch(kernels().capsule_backward, p);
  });
}

int isa_index(const std::string& name) {
  std::string names;
  for (int i = 0; i < isa_count(); ++i) {
    if (name == isa_name(i)) return i;
    names += (i ? ", " : "") + std::string(isa_name(i));
  }
  throw py::value_error("isa: got '" + name + "', expected one of " + names);
}

void bind_machine(py::module_& m) {
  m.def("isa_available", [] {
    std::vector<std::string> names;
    for (int i = 0; i < isa_count(); ++i)
      if (isa_supported(i)) names.emplace_back(isa_name(i));
    return names;
  });
  m.def("isa_active", [] { return std::string(isa_name(isa_active())); });
  m.def("set_isa", [](const std::string& name) { isa_activate(isa_index(name)); });
  m.def("build_info", [] {
    py::dict info;
    info["compiler"] = FASTCNN_BUILD_COMPILER;
    info["isas"] = FASTCNN_BUILD_ISAS;
    info["nvcc"] = FASTCNN_BUILD_NVCC;
    info["cuda_archs"] = FASTCNN_BUILD_CUDA_ARCHS;
    info["sanitize"] = FASTCNN_BUILD_SANITIZE;
    return info;
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  kernels();  // a bad FASTCNN_ISA is an error at import, not at the first call
  bind_pointwise(m);
  bind_conv2d(m);
  bind_depthwise(m);
  bind_fused(m);
  bind_affine_act(m);
  bind_max_pool2d(m);
  bind_dropout(m);
  bind_capsules(m);
  bind_machine(m);
#ifdef FASTCNN_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  fastcnn::cuda::bind(cuda);
#endif
}
