// Element types, their conversions, and loads and stores of pairs and of 16-byte vectors of channels.
#pragma once

#include <cstdint>

#include "platform.cuh"

namespace fastcnn::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr int kVec = 16 / int(sizeof(T));  // channels in 16 bytes

FASTCNN_DEVICE float to_float(float v) { return v; }
FASTCNN_DEVICE float to_float(bf16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }

template <class T>
FASTCNN_DEVICE T from_float(float v);
template <>
FASTCNN_DEVICE float from_float<float>(float v) {
  return v;
}

#ifdef FASTCNN_CUDA_ON_CPU
FASTCNN_DEVICE float to_float(f16 v) { return on_cpu::half_to_float(v.bits); }
template <>
FASTCNN_DEVICE bf16 from_float<bf16>(float v) {
  return {on_cpu::float_to_bfloat16(v)};
}
template <>
FASTCNN_DEVICE f16 from_float<f16>(float v) {
  return {on_cpu::float_to_half(v)};
}
#else
FASTCNN_DEVICE float to_float(f16 v) { return __half2float(__ushort_as_half(v.bits)); }
template <>
FASTCNN_DEVICE bf16 from_float<bf16>(float v) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
FASTCNN_DEVICE f16 from_float<f16>(float v) {
  return {__half_as_ushort(__float2half_rn(v))};
}
#endif

template <class T>
FASTCNN_DEVICE float rounded(float v) {
  return to_float(from_float<T>(v));
}

// Two channels of a pixel: one thread's share in every stencil loop, 4 bytes of the 16-bit types per lane.
FASTCNN_DEVICE float2 load_pair(const float* p) { return *reinterpret_cast<const float2*>(p); }
template <class T>
FASTCNN_DEVICE float2 load_pair(const T* p) {
  const uint32_t word = *reinterpret_cast<const uint32_t*>(p);
  return make_float2(to_float(T{uint16_t(word)}), to_float(T{uint16_t(word >> 16)}));
}

FASTCNN_DEVICE void store_pair(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
template <class T>
FASTCNN_DEVICE void store_pair(T* p, float2 v) {
  const uint32_t low = from_float<T>(v.x).bits, high = from_float<T>(v.y).bits;
  *reinterpret_cast<uint32_t*>(p) = low | high << 16;
}

// The same where the second channel may be missing (odd tail) or the pair unaligned (odd pixel stride).
template <class T>
FASTCNN_DEVICE float2 load_pair(const T* p, int count, bool aligned) {
  if (aligned && count >= 2) return load_pair(p);
  return make_float2(count > 0 ? to_float(p[0]) : 0.f, count > 1 ? to_float(p[1]) : 0.f);
}

template <class T>
FASTCNN_DEVICE void store_pair(T* p, float2 v, int count, bool aligned) {
  if (aligned && count >= 2) {
    store_pair(p, v);
    return;
  }
  if (count > 0) p[0] = from_float<T>(v.x);
  if (count > 1) p[1] = from_float<T>(v.y);
}

FASTCNN_DEVICE float2 fma(float2 a, float2 b, float2 c) {
  return make_float2(fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y));
}

// 16 bytes as kVec<T> channels.
template <class T>
union Vector {
  uint4 words;
  T at[kVec<T>];
};

// Channels [0, count) at p, zeros above; one 16-byte load where the pixel stride keeps it aligned. kMutable:
// the kernel may write there, and __ldg is for what stays constant.
template <class T, bool kMutable = false>
FASTCNN_DEVICE Vector<T> load_vector(const T* p, int count, bool aligned) {
  Vector<T> v;
  if (aligned && count >= kVec<T>) {
    const uint4* whole = reinterpret_cast<const uint4*>(p);
    v.words = kMutable ? *whole : __ldg(whole);
    return v;
  }
  v.words = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if (i < count) v.at[i] = p[i];
  }
  return v;
}

// Values [0, count) to p.
template <class T>
FASTCNN_DEVICE void store_vector(T* p, const float (&values)[kVec<T>], int count, bool aligned) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) v.at[i] = from_float<T>(values[i]);
  if (aligned && count >= kVec<T>) {
    *reinterpret_cast<uint4*>(p) = v.words;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
    if (i < count) p[i] = v.at[i];
  }
}

}  // namespace fastcnn::cuda
