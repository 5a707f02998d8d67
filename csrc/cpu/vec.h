// One small vector type per instruction set; every CPU algorithm is written over it once.
//
// Included only by sources that are compiled per instruction set (FASTCNN_ISA names it, FASTCNN_ISA_LEVEL
// orders them: 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx). Everything is in an anonymous namespace,
// so that no copy made for a newer machine can be linked into code for an older one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if FASTCNN_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

#include "ops/activation.h"

namespace fastcnn {
namespace {

struct bf16 {
  uint16_t bits;
};

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(float x) { return x; }

inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};  // rounding must not turn a NaN into infinity
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

#if FASTCNN_ISA_LEVEL >= 2
#include "cpu/vec_avx512.inc"
#elif FASTCNN_ISA_LEVEL == 1
#include "cpu/vec_avx2.inc"
#else
#include "cpu/vec_portable.inc"
#endif

// Two vectors side by side.
#if FASTCNN_ISA_LEVEL >= 3
inline void store_two(bf16* p, V low, V high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#else
inline void store_two(bf16* p, V low, V high) {
  store(p, low);
  store(p + kLanes, high);
}
#endif
inline void store_two(float* p, V low, V high) {
  store(p, low);
  store(p + kLanes, high);
}

// n elements as they are and zeros after, a vector of kCopied in all.
template <class T>
constexpr int kCopied = int(sizeof(V) / sizeof(T));
inline void copy_vector(float* out, const float* in, int n) { store(out, load(in, n)); }
inline void copy_vector(bf16* out, const bf16* in, int n) {
  store(reinterpret_cast<uint16_t*>(out), load_words(in, n));
}

// e^x by 2^n * p(r), |r| <= ln2 / 2; the polynomial is Cephes' expf (2 ulp). Overflow clamps below infinity.
inline V exp(V x) {
  x = min(max(x, set(-87.33f)), set(88.37f));
  V n = round(mul(x, set(1.44269504088896341f)));
  V r = fnmadd(n, set(-2.12194440e-4f), fnmadd(n, set(0.693359375f), x));
  V p = set(1.9875691500e-4f);
  p = fmadd(p, r, set(1.3981999507e-3f));
  p = fmadd(p, r, set(8.3334519073e-3f));
  p = fmadd(p, r, set(4.1665795894e-2f));
  p = fmadd(p, r, set(1.6666665459e-1f));
  p = fmadd(p, r, set(5.0000001201e-1f));
  return mul(add(fmadd(mul(p, r), r, r), set(1.0f)), exp2_of_integer(n));
}

// ln x of a positive normal x by Cephes' logf. Scaled in two steps: 2^-127 is no normal number.
inline V log(V x) {
  V n = exponent(x);
  const V in_1_2 = mul(mul(x, set(0.5f)), exp2_of_integer(sub(set(1.0f), n))), root2 = set(1.41421356237f);
  n = where_gt(in_1_2, root2, add(n, set(1.0f)), n);
  const V r = sub(where_gt(in_1_2, root2, mul(in_1_2, set(0.5f)), in_1_2), set(1.0f)), r2 = mul(r, r);
  V p = set(7.0376836292e-2f);
  p = fmadd(p, r, set(-1.1514610310e-1f));
  p = fmadd(p, r, set(1.1676998740e-1f));
  p = fmadd(p, r, set(-1.2420140846e-1f));
  p = fmadd(p, r, set(1.4249322787e-1f));
  p = fmadd(p, r, set(-1.6668057665e-1f));
  p = fmadd(p, r, set(2.0000714765e-1f));
  p = fmadd(p, r, set(-2.4999993993e-1f));
  p = fmadd(p, r, set(3.3333331174e-1f));
  p = fmadd(n, set(-2.12194440e-4f), mul(p, mul(r, r2)));
  return fmadd(n, set(0.693359375f), add(fmadd(r2, set(-0.5f), p), r));
}

inline V sigmoid(V z) { return div(set(1.0f), add(set(1.0f), exp(sub(zero(), z)))); }

inline V activate(int act, V z) {
  switch (act) {
    case kRelu:
      return max(z, zero());
    case kRelu6:
      return min(max(z, zero()), set(6.0f));
    case kSilu:
      return mul(z, sigmoid(z));
    case kHardswish:
      return mul(z, mul(min(max(add(z, set(3.0f)), zero()), set(6.0f)), set(1.0f / 6.0f)));
    default:
      return z;
  }
}

// g * act'(z); at the kinks as torch's backward.
inline V activate_grad(int act, V z, V g) {
  switch (act) {
    case kRelu:
      return where_gt(z, zero(), g, zero());
    case kRelu6:
      return where_gt(z, zero(), where_gt(set(6.0f), z, g, zero()), zero());
    case kSilu: {
      V s = sigmoid(z);
      return mul(g, mul(s, fmadd(z, sub(set(1.0f), s), set(1.0f))));
    }
    case kHardswish: {
      V inner = mul(g, fmadd(z, set(1.0f / 3.0f), set(0.5f)));
      return where_gt(set(-3.0f), z, zero(), where_gt(z, set(3.0f), g, inner));
    }
    default:
      return g;
  }
}

}  // namespace
}  // namespace fastcnn
