// Capsule votes and routing, forward: one pass over the input capsules per iteration, votes made on the way.
#include "cpu/by_dtype.h"
#include "cpu/capsule_tiles.h"
#include "cpu/kernels.h"

namespace fastcnn {
namespace {

template <class T>
class Forward {
 public:
  explicit Forward(const CapsuleForward& p)
      : p_(p),
        s_(p.shape),
        chunks_(p.shape),
        tiles_(p.shape),
        u_(size_t(tiles_.count * s_.in_caps * s_.in_dim * kLanes)),
        total_(size_t(tiles_.count * tiles_.outputs)),
        parts_(size_t(chunks_.count * tiles_.count * tiles_.outputs)) {}

  void run() {
    capsules_to_lanes(s_, static_cast<const T*>(p_.u), u_.data());
    for (int t = 0; t < s_.iterations; ++t) {
      parallel_for(chunks_.count * tiles_.count,
                   [&](int64_t unit) { pass(t, unit / tiles_.count, unit % tiles_.count); });
      parallel_for(tiles_.count, [&](int64_t tile) { finish(t, tile); });
    }
  }

 private:
  float* part(int64_t chunk, int64_t tile) {
    return parts_.data() + (chunk * tiles_.count + tile) * tiles_.outputs;
  }

  // A chunk's share of s for a tile of images.
  void pass(int t, int64_t chunk, int64_t tile) {
    float *sum = part(chunk, tile), *votes = thread_scratch(size_t(tiles_.outputs + s_.out_caps * kLanes)),
          *coupling = votes + tiles_.outputs;
    const float* total = total_.data() + tile * tiles_.outputs;
    std::memset(sum, 0, size_t(tiles_.outputs) * sizeof(float));
    for (int64_t i = chunks_.first(chunk); i < chunks_.last(chunk); ++i) {
      make_votes(s_, u_.data() + (tile * s_.in_caps + i) * s_.in_dim * kLanes,
                 p_.weight + i * s_.outputs() * s_.in_dim, votes);
      if (t == 0) {
        add_all(votes, sum, tiles_.outputs);
        continue;
      }
      agreements(s_, votes, total, coupling);
      couple(s_, coupling);
      add_scaled(s_, coupling, votes, sum);
    }
  }

  // s and v of a tile from all chunks' shares.
  void finish(int t, int64_t tile) {
    float *s = thread_scratch(size_t(2 * tiles_.outputs)), *v = s + tiles_.outputs;
    const V scale = set(t == 0 ? first_coupling(s_) : 1.0f);
    for (int64_t i = 0; i < s_.outputs(); ++i) {
      V sum = load(part(0, tile) + i * kLanes);
      for (int64_t chunk = 1; chunk < chunks_.count; ++chunk)
        sum = add(sum, load(part(chunk, tile) + i * kLanes));
      store(s + i * kLanes, fmadd(sum, scale, set(p_.bias ? p_.bias[i] : 0.0f)));
    }
    for (int64_t o = 0; o < s_.out_caps; ++o)
      squash_lanes(s + o * s_.out_dim * kLanes, s_.out_dim, v + o * s_.out_dim * kLanes);
    const int64_t image = tile * kLanes, images = tiles_.images(tile), outputs = s_.outputs();
    from_lanes(s, outputs, images, p_.s + (t * s_.batch + image) * outputs, outputs);
    if (t + 1 == s_.iterations)
      from_lanes(v, outputs, images, static_cast<T*>(p_.v) + image * outputs, outputs);
    else if (t == 0)
      std::memcpy(total_.data() + tile * tiles_.outputs, v, size_t(tiles_.outputs) * sizeof(float));
    else
      add_all(v, total_.data() + tile * tiles_.outputs, tiles_.outputs);
  }

  const CapsuleForward& p_;
  const CapsuleShape& s_;
  const CapsuleChunks chunks_;
  const ImageTiles tiles_;
  AlignedBuffer<float> u_;
  AlignedBuffer<float> total_;  // of v over the iterations so far
  AlignedBuffer<float> parts_;
};

void capsule_forward(const CapsuleForward& p) {
  by_dtype(p.shape.dtype, &Kernels::capsule_forward, p, [&](auto t) { Forward<decltype(t)>(p).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_capsule_forward(Kernels& k) { k.capsule_forward = capsule_forward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
