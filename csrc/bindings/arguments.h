// Python in, plain structs out; nothing else. Pointers come as integers, 0 is null.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "cpu/call_list.h"
#include "cpu/kernels.h"
#include "ops/activation.h"

namespace fastcnn {

namespace py = pybind11;
using Pointer = uintptr_t;

inline const float* floats(Pointer p) { return reinterpret_cast<const float*>(p); }
inline float* mutable_floats(Pointer p) { return reinterpret_cast<float*>(p); }
inline Activations activations(Pointer p, int64_t ld) { return {reinterpret_cast<const void*>(p), ld}; }

inline Dtype dtype_of(int code) {
  if (code != kFloat32 && code != kBfloat16)
    throw py::value_error("dtype: got " + std::to_string(code) + ", expected 0 (float32) or 1 (bfloat16)");
  return static_cast<Dtype>(code);
}

// (data, dtype, stride_n, stride_c, stride_h, stride_w)
inline Conv2dWeight conv2d_weight(const py::tuple& t) {
  return {reinterpret_cast<const void*>(t[0].cast<Pointer>()),
          dtype_of(t[1].cast<int>()),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<int64_t>()};
}

// (scale, shift, act)
inline ScaleShiftAct affine(const py::tuple& t) {
  return {floats(t[0].cast<Pointer>()), floats(t[1].cast<Pointer>()), t[2].cast<int>()};
}

// (scale, shift, act, residual, residual_ld, out, out_ld, mean, var)
inline Epilogue epilogue(const py::tuple& t) {
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
inline GradientPrologue gradient(const py::tuple& t) {
  GradientPrologue g;
  g.grad = activations(t[0].cast<Pointer>(), t[1].cast<int64_t>());
  g.y = activations(t[2].cast<Pointer>(), t[3].cast<int64_t>());
  g.affine = {floats(t[4].cast<Pointer>()), floats(t[5].cast<Pointer>()), t[6].cast<int>()};
  g.coef = floats(t[7].cast<Pointer>());
  return g;
}

// (x, x_ld, scale, shift, act, mean)
inline BackwardInput backward_input(const py::tuple& t) {
  BackwardInput b;
  b.x = activations(t[0].cast<Pointer>(), t[1].cast<int64_t>());
  b.affine = {floats(t[2].cast<Pointer>()), floats(t[3].cast<Pointer>()), t[4].cast<int>()};
  b.mean = floats(t[5].cast<Pointer>());
  return b;
}

// (dx, dx_ld, dw, sums, residual, residual_ld, scales)
inline BackwardOutput backward_output(const py::tuple& t) {
  BackwardOutput o;
  o.dx = reinterpret_cast<void*>(t[0].cast<Pointer>());
  o.dx_ld = t[1].cast<int64_t>();
  o.dw = mutable_floats(t[2].cast<Pointer>());
  o.sums = mutable_floats(t[3].cast<Pointer>());
  o.residual = activations(t[4].cast<Pointer>(), t[5].cast<int64_t>());
  o.scales = t[6].cast<bool>();
  return o;
}

// (rows, channels, rows_per_sample, unit, threshold, scale, seed), seed: where the 64-bit seed and offset are
inline DropoutMask dropout_mask(const py::tuple& t) {
  if (CallList* list = CallList::recording()) list->refuse();
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

template <class Call>
void launch(Call call) {
  if (CallList* list = CallList::recording()) list->add(call);
  py::gil_scoped_release release;
  call();
}

template <class Parameters>
void launch(void (*kernel)(const Parameters&), const Parameters& parameters) {
  launch([kernel, parameters] { kernel(parameters); });
}

void bind_convolutions(py::module_& m);
void bind_passes(py::module_& m);
void bind_capsules(py::module_& m);
void bind_dense_block(py::module_& m);
void bind_replay(py::module_& m);

}  // namespace fastcnn
