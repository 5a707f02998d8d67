// Passes over memory: affine maps with activation, pooling, local response normalisation, dropout.
#include "bindings/arguments.h"

namespace fastcnn {
namespace {

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
MaxPool2dForward max_pool2d_geometry(const py::tuple& t, bool indexed) {
  MaxPool2dForward p;
  int64_t* sizes[] = {&p.images, &p.channels, &p.in_h, &p.in_w, &p.out_h, &p.out_w};
  int* geometry[] = {&p.kernel_h, &p.kernel_w, &p.stride_h, &p.stride_w, &p.pad_h, &p.pad_w};
  for (int i = 0; i < 6; ++i) *sizes[i] = t[i].cast<int64_t>();
  for (int i = 0; i < 6; ++i) *geometry[i] = t[6 + i].cast<int>();
  p.dtype = dtype_of(t[12].cast<int>());
  const auto pair = [](int h, int w) { return "(" + std::to_string(h) + ", " + std::to_string(w) + ")"; };
  const std::string kernel = pair(p.kernel_h, p.kernel_w);
  if (2 * p.pad_h > p.kernel_h || 2 * p.pad_w > p.kernel_w)
    throw std::invalid_argument("padding: got " + pair(p.pad_h, p.pad_w) +
                                ", expected at most half of the window " + kernel);
  if (indexed && p.kernel_h * p.kernel_w > kMostPositions)
    throw std::invalid_argument("kernel: got " + kernel + ", expected at most " +
                                std::to_string(kMostPositions) + " positions where an index is kept");
  return p;
}

void bind_max_pool2d(py::module_& m) {
  m.def("max_pool2d_forward",
        [](const py::tuple& shape, Pointer x, int64_t x_ld, Pointer out, int64_t out_ld, Pointer index) {
          MaxPool2dForward p = max_pool2d_geometry(shape, index != 0);
          p.x = activations(x, x_ld);
          p.out = reinterpret_cast<void*>(out);
          p.out_ld = out_ld;
          p.index = reinterpret_cast<uint8_t*>(index);
          launch(kernels().max_pool2d_forward, p);
        });
  m.def("max_pool2d_backward",
        [](const py::tuple& shape, Pointer grad, int64_t grad_ld, Pointer index, Pointer dx, int64_t dx_ld) {
          MaxPool2dBackward p;
          p.geometry = max_pool2d_geometry(shape, true);
          p.grad = activations(grad, grad_ld);
          p.index = reinterpret_cast<const uint8_t*>(index);
          p.dx = reinterpret_cast<void*>(dx);
          p.dx_ld = dx_ld;
          launch(kernels().max_pool2d_backward, p);
        });
}

// (images, channels, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
// counts_padding, dtype)
AvgPool2dShape avg_pool2d_shape(const py::tuple& t) {
  AvgPool2dShape s;
  int64_t* sizes[] = {&s.images, &s.channels, &s.in_h, &s.in_w, &s.out_h, &s.out_w};
  int* geometry[] = {&s.kernel_h, &s.kernel_w, &s.stride_h, &s.stride_w, &s.pad_h, &s.pad_w};
  for (int i = 0; i < 6; ++i) *sizes[i] = t[i].cast<int64_t>();
  for (int i = 0; i < 6; ++i) *geometry[i] = t[6 + i].cast<int>();
  s.counts_padding = t[12].cast<bool>();
  s.dtype = dtype_of(t[13].cast<int>());
  return s;
}

void bind_avg_pool2d(py::module_& m) {
  m.def("avg_pool2d_forward", [](const py::tuple& shape, Pointer x, int64_t x_ld, const py::tuple& prologue,
                                 Pointer out, int64_t out_ld) {
    AvgPool2dForward p{avg_pool2d_shape(shape), activations(x, x_ld), affine(prologue),
                       reinterpret_cast<void*>(out), out_ld};
    launch(kernels().avg_pool2d_forward, p);
  });
  m.def("avg_pool2d_backward", [](const py::tuple& shape, Pointer grad, int64_t grad_ld,
                                  const py::tuple& input, Pointer dx, int64_t dx_ld, Pointer sums) {
    AvgPool2dBackward p{avg_pool2d_shape(shape),
                        activations(grad, grad_ld),
                        backward_input(input),
                        reinterpret_cast<void*>(dx),
                        dx_ld,
                        mutable_floats(sums)};
    launch(kernels().avg_pool2d_backward, p);
  });
}

// (pixels, channels, dtype), (before, after, share, beta, k)
LocalResponseNorm local_response_norm_parameters(const py::tuple& shape, const py::tuple& window) {
  LocalResponseNorm p;
  p.pixels = shape[0].cast<int64_t>();
  p.channels = shape[1].cast<int64_t>();
  p.dtype = dtype_of(shape[2].cast<int>());
  p.before = window[0].cast<int64_t>();
  p.after = window[1].cast<int64_t>();
  p.share = window[2].cast<float>();
  p.beta = window[3].cast<float>();
  p.k = window[4].cast<float>();
  return p;
}

void bind_local_response_norm(py::module_& m) {
  m.def("local_response_norm", [](const py::tuple& shape, const py::tuple& window, Pointer x, int64_t x_ld,
                                  Pointer grad, int64_t grad_ld, Pointer out, int64_t out_ld) {
    LocalResponseNorm p = local_response_norm_parameters(shape, window);
    p.x = activations(x, x_ld);
    p.grad = activations(grad, grad_ld);
    p.out = reinterpret_cast<void*>(out);
    p.out_ld = out_ld;
    launch(kernels().local_response_norm, p);
  });
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

}  // namespace

void bind_passes(py::module_& m) {
  bind_affine_act(m);
  bind_max_pool2d(m);
  bind_avg_pool2d(m);
  bind_local_response_norm(m);
  bind_dropout(m);
}

}  // namespace fastcnn
