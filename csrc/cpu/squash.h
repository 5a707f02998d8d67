// squash of vectors that lie across lanes (lane_tiles.h): v = s * n / (1 + n^2), n = |s|.
#pragma once

#include "cpu/vec.h"

namespace fastcnn {
namespace {

struct SquashFactors {
  V norm;   // n; 1 where it is 0, and then f is 0
  V f;      // n / (1 + n^2)
  V slope;  // n f'(n)
};

// Squares of s over its largest value neither overflow nor vanish, and n / (1 + n^2) is the same for n and 1
// / n.
inline SquashFactors squash_factors(const float* s, int64_t dim) {
  V largest = zero();
  for (int64_t i = 0; i < dim; ++i) {
    const V x = load(s + i * kLanes);
    largest = max(largest, max(x, sub(zero(), x)));
  }
  const V unit = where_gt(largest, zero(), largest, set(1.0f));
  V square = zero();
  for (int64_t i = 0; i < dim; ++i) {
    const V x = div(load(s + i * kLanes), unit);
    square = fmadd(x, x, square);
  }
  const V norm = mul(sqrt(where_gt(largest, zero(), square, set(1.0f))), unit), one = set(1.0f);
  const V m = min(norm, div(one, norm)), m2 = mul(m, m), f = div(m, add(one, m2));
  const V slope = div(mul(f, sub(one, m2)), add(one, m2));
  SquashFactors factors;
  factors.norm = norm;
  factors.f = where_gt(largest, zero(), f, zero());
  factors.slope = where_gt(norm, one, sub(zero(), slope), slope);
  return factors;
}

inline void squash_lanes(const float* s, int64_t dim, float* v) {
  const V f = squash_factors(s, dim).f;
  for (int64_t i = 0; i < dim; ++i) store(v + i * kLanes, mul(f, load(s + i * kLanes)));
}

// ds = f g + n f' (s . g) s / n^2.
inline void squash_gradient_lanes(const float* s, const float* g, int64_t dim, float* ds) {
  const SquashFactors q = squash_factors(s, dim);
  V along = zero();
  for (int64_t i = 0; i < dim; ++i)
    along = fmadd(div(load(s + i * kLanes), q.norm), load(g + i * kLanes), along);
  along = mul(along, q.slope);
  for (int64_t i = 0; i < dim; ++i)
    store(ds + i * kLanes, fmadd(div(load(s + i * kLanes), q.norm), along, mul(q.f, load(g + i * kLanes))));
}

}  // namespace
}  // namespace fastcnn
