// From run-time dtype and filter shape to template arguments.
#pragma once

#include <stdexcept>

#include "plan.h"
#include "vec.cuh"

namespace fastcnn::cuda {

template <class T>
struct Type {
  using type = T;
};

template <int K, int S>
struct Unrolled {};

// function(Type<T>) for the dtype.
template <class Function>
void with_dtype(int dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(Type<float>());
    case kBFloat16:
      return function(Type<bf16>());
    case kFloat16:
      return function(Type<f16>());
  }
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16");
}

// function(Unrolled<kernel, stride>), or Unrolled<0, 0> for the loop over any filter.
template <class Function>
void with_unrolled(const Geometry& g, Function function) {
  const int kernel = unrolled_kernel(g);
  const bool unit = g.stride_h == 1;
  if (kernel == 3) return unit ? function(Unrolled<3, 1>()) : function(Unrolled<3, 2>());
  if (kernel == 5) return unit ? function(Unrolled<5, 1>()) : function(Unrolled<5, 2>());
  if (kernel == 7) return unit ? function(Unrolled<7, 1>()) : function(Unrolled<7, 2>());
  function(Unrolled<0, 0>());
}

}  // namespace fastcnn::cuda
