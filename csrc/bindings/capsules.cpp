// squash and capsule routing.
#include "bindings/arguments.h"

namespace fastcnn {
namespace {

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

}  // namespace

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

}  // namespace fastcnn
