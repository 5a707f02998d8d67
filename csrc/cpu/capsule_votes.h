// What a pass over the input capsules does for kLanes images at once: votes, logits, coupling coefficients.
//
// Votes are made again in every pass: 2 in_dim operations each, where reading one from memory would cost 4
// bytes and keeping it another 4. W's numbers are broadcast, images lie across lanes.
#pragma once

#include "cpu/lane_tiles.h"
#include "cpu/parallel.h"
#include "ops/capsule.h"

namespace fastcnn {
namespace {

constexpr int64_t kChunkBytes = 256 * 1024;  // of W that a unit of work keeps in L2 for all images
constexpr int64_t kMostChunks = 64;

// Input capsules in chunks; fixed by the shape alone, so that any number of threads sums in one order.
struct CapsuleChunks {
  int64_t in_caps, size, count;

  explicit CapsuleChunks(const CapsuleShape& s) : in_caps(s.in_caps) {
    const int64_t bytes = s.outputs() * s.in_dim * 4, fit = kChunkBytes / (bytes < 1 ? 1 : bytes);
    const int64_t least = ceil_div(in_caps, kMostChunks);
    size = fit < least ? least : fit;
    count = ceil_div(in_caps, size);
  }
  int64_t first(int64_t chunk) const { return chunk * size; }
  int64_t last(int64_t chunk) const { return (chunk + 1) * size < in_caps ? (chunk + 1) * size : in_caps; }
};

// kCount neighbouring votes of one output capsule, from `weight` [in_dim][out_dim] on.
template <int kCount>
inline void some_votes(const float* u, const float* weight, int64_t in_dim, int64_t out_dim, float* votes) {
  V acc[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) acc[i] = zero();
  for (int64_t d = 0; d < in_dim; ++d) {
    const V x = load(u + d * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) acc[i] = fmadd(set(weight[d * out_dim + i]), x, acc[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(votes + i * kLanes, acc[i]);
}

// votes [out_caps * out_dim][kLanes] of one input capsule: u [in_dim][kLanes], weight
// [out_caps][in_dim][out_dim].
inline void make_votes(const CapsuleShape& s, const float* u, const float* weight, float* votes) {
  for (int64_t o = 0; o < s.out_caps; ++o, weight += s.in_dim * s.out_dim) {
    int64_t e = 0;
    for (; e + 8 <= s.out_dim; e += 8)
      some_votes<8>(u, weight + e, s.in_dim, s.out_dim, votes + (o * s.out_dim + e) * kLanes);
    for (; e + 4 <= s.out_dim; e += 4)
      some_votes<4>(u, weight + e, s.in_dim, s.out_dim, votes + (o * s.out_dim + e) * kLanes);
    for (; e < s.out_dim; ++e)
      some_votes<1>(u, weight + e, s.in_dim, s.out_dim, votes + (o * s.out_dim + e) * kLanes);
  }
}

// out[o] = votes[o] . other[o]
inline void agreements(const CapsuleShape& s, const float* votes, const float* other, float* out) {
  for (int64_t o = 0; o < s.out_caps; ++o) {
    V sum = zero(), rest = zero();
    int64_t e = 0;
    for (; e + 2 <= s.out_dim; e += 2) {
      const int64_t at = (o * s.out_dim + e) * kLanes;
      sum = fmadd(load(votes + at), load(other + at), sum);
      rest = fmadd(load(votes + at + kLanes), load(other + at + kLanes), rest);
    }
    if (e < s.out_dim) {
      const int64_t at = (o * s.out_dim + e) * kLanes;
      sum = fmadd(load(votes + at), load(other + at), sum);
    }
    store(out + o * kLanes, add(sum, rest));
  }
}

// Logits become coupling coefficients, in place: softmax over the output capsules, with one more logit of 0
// if leaky.
inline void couple(const CapsuleShape& s, float* logits) {
  V largest = s.leaky ? zero() : load(logits);
  for (int64_t o = 0; o < s.out_caps; ++o) largest = max(largest, load(logits + o * kLanes));
  V total = s.leaky ? exp(sub(zero(), largest)) : zero();
  for (int64_t o = 0; o < s.out_caps; ++o) {
    const V e = exp(sub(load(logits + o * kLanes), largest));
    store(logits + o * kLanes, e);
    total = add(total, e);
  }
  const V inverse = div(set(1.0f), total);
  for (int64_t o = 0; o < s.out_caps; ++o)
    store(logits + o * kLanes, mul(load(logits + o * kLanes), inverse));
}

// What every output capsule gets in the first iteration.
inline float first_coupling(const CapsuleShape& s) { return 1.0f / float(s.out_caps + (s.leaky ? 1 : 0)); }

// into[o] += factor[o] * from[o]
inline void add_scaled(const CapsuleShape& s, const float* factor, const float* from, float* into) {
  for (int64_t o = 0; o < s.out_caps; ++o) {
    const V f = load(factor + o * kLanes);
    for (int64_t at = o * s.out_dim * kLanes; at < (o + 1) * s.out_dim * kLanes; at += kLanes)
      store(into + at, fmadd(f, load(from + at), load(into + at)));
  }
}

// db of a softmax from its coefficients and the gradients of them, in place of the latter: c (a - sum of c
// a).
inline void uncouple(const CapsuleShape& s, const float* coupling, float* a) {
  V mean = zero();
  for (int64_t o = 0; o < s.out_caps; ++o)
    mean = fmadd(load(coupling + o * kLanes), load(a + o * kLanes), mean);
  for (int64_t o = 0; o < s.out_caps; ++o)
    store(a + o * kLanes, mul(load(coupling + o * kLanes), sub(load(a + o * kLanes), mean)));
}

}  // namespace
}  // namespace fastcnn
