// What fastcnn.replay asks for: kernels as lists of calls, and whether Python objects hold what they held.
#include <stdexcept>

#include "bindings/arguments.h"

namespace fastcnn {
namespace {

// The values of Python dicts at one time.
class DictSnapshot {
 public:
  explicit DictSnapshot(std::vector<py::dict> dicts) : dicts_(std::move(dicts)) {
    for (const py::dict& dict : dicts_)
      for (const auto& item : dict) values_.push_back(py::reinterpret_borrow<py::object>(item.second));
  }

  // Whether the dicts hold the very same objects.
  bool unchanged() const {
    size_t i = 0;
    for (const py::dict& dict : dicts_)
      for (const auto& item : dict)
        if (i == values_.size() || !values_[i++].is(item.second)) return false;
    return i == values_.size();
  }

 private:
  std::vector<py::dict> dicts_;
  std::vector<py::object> values_;
};

}  // namespace

void bind_replay(py::module_& m) {
  py::class_<DictSnapshot>(m, "DictSnapshot")
      .def(py::init<std::vector<py::dict>>())
      .def("unchanged", &DictSnapshot::unchanged);
  py::class_<CallList>(m, "CallList")
      .def(py::init())
      .def("__len__", &CallList::size)
      .def_property_readonly("repeatable", &CallList::repeatable)
      .def("start",
           [](CallList& list) {
             if (CallList::recording())
               throw std::runtime_error("CallList.start: this thread's calls are being recorded already");
             CallList::recording() = &list;
           })
      .def("stop",
           [](CallList& list) {
             if (CallList::recording() == &list) CallList::recording() = nullptr;
           })
      .def("run", [](const CallList& list, size_t first, size_t last) {
        if (first > last || last > list.size())
          throw std::invalid_argument("CallList.run: got calls " + std::to_string(first) + " to " +
                                      std::to_string(last) + " of " + std::to_string(list.size()));
        py::gil_scoped_release release;
        list.run(first, last);
      });
}

}  // namespace fastcnn
