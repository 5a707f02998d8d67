// The CUDA launchers in Python: pointers are ints, 0 where an operand is absent.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "plan.h"

namespace fastcnn::cuda {
namespace {

namespace py = pybind11;
using Pointer = uintptr_t;
using AffineArguments = std::tuple<Pointer, Pointer, int>;  // scale, shift, activation
using ViewArguments = std::tuple<Pointer, int64_t>;         // data, pixel stride
using FilterArguments = std::tuple<Pointer, bool>;          // data, is float32
// Rows, channels, rows per sample, unit, threshold, scale, seed.
using MaskArguments = std::tuple<int64_t, int64_t, int64_t, int, uint64_t, float, Pointer>;

// Batch, in_caps, in_dim, out_caps, out_dim, iterations, leaky, dtype.
using CapsuleArguments = std::tuple<int64_t, int, int, int, int, int, bool, int>;

template <class T>
T* pointer(Pointer p) {
  return reinterpret_cast<T*>(p);
}
View view(const ViewArguments& v) { return {pointer<void>(std::get<0>(v)), std::get<1>(v)}; }
Filter filter(const FilterArguments& f) { return {pointer<void>(std::get<0>(f)), std::get<1>(f)}; }
ChannelAffine affine(const AffineArguments& a) {
  return {pointer<float>(std::get<0>(a)), pointer<float>(std::get<1>(a)), std::get<2>(a)};
}
DropoutMask mask(const MaskArguments& m) {
  return {std::get<0>(m),
          std::get<1>(m),
          std::get<2>(m),
          std::get<3>(m),
          std::get<4>(m),
          std::get<5>(m),
          pointer<uint64_t>(std::get<6>(m))};
}

CapsuleShape capsule_shape(const CapsuleArguments& a) {
  return {std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a),
          std::get<4>(a), std::get<5>(a), std::get<6>(a), std::get<7>(a)};
}

// Why no kernel of this build can run here, or an empty string.
std::string unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return count == 0 ? "no CUDA device" : "";
}

Device device(int index) {
  Device d{};
  const auto read = [&](cudaDeviceAttr attribute, int& value) {
    const cudaError_t error = cudaDeviceGetAttribute(&value, attribute, index);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  };
  read(cudaDevAttrMultiProcessorCount, d.multiprocessors);
  read(cudaDevAttrMaxSharedMemoryPerBlockOptin, d.shared_bytes);
  return d;
}

// The current device of the statically linked runtime is its own, so the
// tensors' device is made current for a launch.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&previous_));
    if (index != previous_) check(cudaSetDevice(index));
    changed_ = index != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }
  int previous_ = 0;
  bool changed_ = false;
};

void run_depthwise_fwd(int device_index, const Geometry& g, int dtype, const DepthwisePlan& plan,
                       ViewArguments x, FilterArguments weight, AffineArguments in, AffineArguments out,
                       ViewArguments residual, ViewArguments y, Pointer mean, Pointer var, Pointer workspace,
                       Pointer stream) {
  const DeviceGuard guard(device_index);
  depthwise_fwd({g, dtype, view(x), filter(weight), affine(in), affine(out), view(residual), view(y),
                 pointer<float>(mean), pointer<float>(var), pointer<float>(workspace), pointer<void>(stream)},
                plan);
}

void run_depthwise_bwd(int device_index, const Geometry& g, int dtype, const DepthwisePlan& plan,
                       ViewArguments grad, ViewArguments y, AffineArguments out, Pointer coef,
                       ViewArguments x, AffineArguments in, Pointer x_mean, FilterArguments weight,
                       ViewArguments dx, Pointer dw, Pointer sums, Pointer workspace, Pointer stream) {
  const DeviceGuard guard(device_index);
  depthwise_bwd({g, dtype, view(grad), view(y), affine(out), pointer<float>(coef), view(x), affine(in),
                 pointer<float>(x_mean), filter(weight), view(dx), pointer<float>(dw), pointer<float>(sums),
                 pointer<float>(workspace), pointer<void>(stream)},
                plan);
}

void run_separable_fwd(int device_index, const Geometry& g, int channels, int dtype,
                       const SeparablePlan& plan, ViewArguments x, FilterArguments weight, Pointer pointwise,
                       AffineArguments in, AffineArguments mid, AffineArguments out, ViewArguments residual,
                       ViewArguments y, Pointer mean, Pointer var, Pointer workspace, Pointer stream) {
  const DeviceGuard guard(device_index);
  separable_fwd({g, channels, dtype, view(x), filter(weight), pointer<void>(pointwise), affine(in),
                 affine(mid), affine(out), view(residual), view(y), pointer<float>(mean), pointer<float>(var),
                 pointer<float>(workspace), pointer<void>(stream)},
                plan);
}

DropoutPlan make_dropout_plan(const MaskArguments& m, int dtype, bool with_bias, bool with_sums,
                              const Device& gpu) {
  return plan_dropout(mask(m), dtype, with_bias, with_sums, gpu);
}

void run_dropout_fwd(int device_index, const MaskArguments& m, int dtype, const DropoutPlan& plan, Pointer x,
                     Pointer bias, int act, Pointer residual, Pointer out, Pointer stream) {
  const DeviceGuard guard(device_index);
  dropout_fwd({mask(m), dtype, pointer<void>(x), pointer<float>(bias), act, pointer<void>(residual),
               pointer<void>(out), pointer<void>(stream)},
              plan);
}

void run_dropout_bwd(int device_index, const MaskArguments& m, int dtype, const DropoutPlan& plan,
                     Pointer grad, Pointer z, Pointer bias, int act, Pointer dx, Pointer dbias,
                     Pointer workspace, Pointer stream) {
  const DeviceGuard guard(device_index);
  dropout_bwd({mask(m), dtype, pointer<void>(grad), pointer<void>(z), pointer<float>(bias), act,
               pointer<void>(dx), pointer<float>(dbias), pointer<float>(workspace), pointer<void>(stream)},
              plan);
}

CapsuleFwdPlan make_capsule_fwd_plan(const CapsuleArguments& shape, const Device& gpu) {
  return plan_capsule_fwd(capsule_shape(shape), gpu);
}

CapsuleBwdPlan make_capsule_bwd_plan(const CapsuleArguments& shape, bool detach, const Device& gpu) {
  return plan_capsule_bwd(capsule_shape(shape), detach, gpu);
}

void run_capsule_fwd(int device_index, const CapsuleArguments& shape, const CapsuleFwdPlan& plan, Pointer u,
                     Pointer weight, Pointer bias, Pointer v, Pointer s, Pointer workspace, Pointer stream) {
  const DeviceGuard guard(device_index);
  capsule_fwd({capsule_shape(shape), pointer<void>(u), pointer<float>(weight), pointer<float>(bias),
               pointer<void>(v), pointer<float>(s), pointer<float>(workspace), pointer<void>(stream)},
              plan);
}

void run_capsule_bwd(int device_index, const CapsuleArguments& shape, bool detach, const CapsuleBwdPlan& plan,
                     Pointer grad, Pointer u, Pointer weight, Pointer s, Pointer du, Pointer dw,
                     Pointer dbias, Pointer workspace, Pointer stream) {
  const DeviceGuard guard(device_index);
  capsule_bwd({capsule_shape(shape), detach, pointer<void>(grad), pointer<void>(u), pointer<float>(weight),
               pointer<float>(s), pointer<void>(du), pointer<float>(dw), pointer<float>(dbias),
               pointer<float>(workspace), pointer<void>(stream)},
              plan);
}

Geometry geometry(std::array<int, 4> x, std::array<int, 2> output, std::array<int, 3> weight,
                  std::array<int, 2> stride, std::array<int, 2> padding, std::array<int, 2> dilation) {
  return {x[0],      x[1],      x[2],      x[3],       output[0],  output[1],   weight[0],  weight[1],
          weight[2], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
}

}  // namespace

// Called by csrc/bindings.cpp.
void bind(py::module_& m) {
  py::class_<Device>(m, "Device")
      .def_readonly("multiprocessors", &Device::multiprocessors)
      .def_readonly("shared_bytes", &Device::shared_bytes);
  py::class_<Geometry>(m, "Geometry")
      .def(py::init(&geometry),
           "x: n, h, w, k; output: p, q; weight: c, r, s; then stride, padding, dilation");
  py::class_<DepthwisePlan>(m, "DepthwisePlan").def_readonly("workspace", &DepthwisePlan::workspace);
  py::class_<SeparablePlan>(m, "SeparablePlan").def_readonly("workspace", &SeparablePlan::workspace);
  py::class_<DropoutPlan>(m, "DropoutPlan").def_readonly("workspace", &DropoutPlan::workspace);
  py::class_<CapsuleFwdPlan>(m, "CapsuleFwdPlan").def_readonly("workspace", &CapsuleFwdPlan::workspace);
  py::class_<CapsuleBwdPlan>(m, "CapsuleBwdPlan").def_readonly("workspace", &CapsuleBwdPlan::workspace);
  m.def("unavailable", &unavailable);
  m.def("device", &device);
  m.def("plan_depthwise_fwd", &plan_depthwise_fwd);
  m.def("plan_depthwise_bwd", &plan_depthwise_bwd);
  m.def("plan_separable_fwd", &plan_separable_fwd, py::arg("geometry"), py::arg("channels"), py::arg("dtype"),
        py::arg("device"), py::arg("m") = 0);
  m.def("plan_dropout", &make_dropout_plan);
  m.def("plan_capsule_fwd", &make_capsule_fwd_plan);
  m.def("plan_capsule_bwd", &make_capsule_bwd_plan);
  m.def("depthwise_fwd", &run_depthwise_fwd);
  m.def("depthwise_bwd", &run_depthwise_bwd);
  m.def("separable_fwd", &run_separable_fwd);
  m.def("dropout_fwd", &run_dropout_fwd);
  m.def("dropout_bwd", &run_dropout_bwd);
  m.def("capsule_fwd", &run_capsule_fwd);
  m.def("capsule_bwd", &run_capsule_bwd);
}

}  // namespace fastcnn::cuda
