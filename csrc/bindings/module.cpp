// The module: what the machine has, and every op's functions.
#include <vector>

#include "bindings/arguments.h"

#ifdef FASTCNN_WITH_CUDA
namespace fastcnn::cuda {
void bind(pybind11::module_& m);
}
#endif

using namespace fastcnn;

namespace {

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
  bind_convolutions(m);
  bind_passes(m);
  bind_capsules(m);
  bind_dense_block(m);
  bind_replay(m);
  bind_machine(m);
#ifdef FASTCNN_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  fastcnn::cuda::bind(cuda);
#endif
}
