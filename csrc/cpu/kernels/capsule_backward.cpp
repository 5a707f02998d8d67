// Capsule votes and routing, backward: the iterations from the last to the second, a pass over the input
// capsules each, then one pass that makes du and dW of what all iterations want of a vote.
#include "cpu/by_dtype.h"
#include "cpu/capsule_tiles.h"
#include "cpu/kernels.h"
#include "cpu/statistics.h"

namespace fastcnn {
namespace {

template <class T>
class Backward {
 public:
  explicit Backward(const CapsuleBackward& p)
      : p_(p),
        s_(p.shape),
        chunks_(p.shape),
        tiles_(p.shape),
        last_(s_.iterations - 1),
        plane_(tiles_.count * tiles_.outputs),
        u_(size_t(tiles_.count * s_.in_caps * s_.in_dim * kLanes)),
        ds_(size_t(s_.iterations * plane_)),
        total_(size_t(s_.iterations * plane_)),
        raw_(size_t(s_.iterations * plane_)),
        dv_(size_t(plane_)),
        parts_(size_t(chunks_.count * plane_)) {}

  void run() {
    capsules_to_lanes(s_, static_cast<const T*>(p_.u), u_.data());
    parallel_for(tiles_.count, [&](int64_t tile) { prepare(tile); });
    for (int t = last_; t > 0 && !p_.detach; --t) {
      parallel_for(chunks_.count * tiles_.count,
                   [&](int64_t unit) { total_gradient(t, unit / tiles_.count, unit % tiles_.count); });
      parallel_for(tiles_.count, [&](int64_t tile) { step_back(t, tile); });
    }
    bias_gradient();
    if (p_.du || p_.dw) parallel_for(chunks_.count, [&](int64_t chunk) { gradients(chunk); });
  }

 private:
  float* at(AlignedBuffer<float>& planes, int t, int64_t tile) const {
    return planes.data() + t * plane_ + tile * tiles_.outputs;
  }
  const float* capsule(int64_t tile, int64_t i) {
    return u_.data() + (tile * s_.in_caps + i) * s_.in_dim * kLanes;
  }
  const float* weight(int64_t i) const { return p_.weight + i * s_.outputs() * s_.in_dim; }
  // Iterations whose coupling coefficients' gradients count: none if they are constants.
  int first_iteration() const { return p_.detach ? last_ : 0; }

  void squash_gradient(int t, int64_t tile) {
    for (int64_t o = 0; o < s_.out_caps; ++o) {
      const int64_t from = o * s_.out_dim * kLanes;
      squash_gradient_lanes(at(raw_, t, tile) + from, at(dv_, 0, tile) + from, s_.out_dim,
                            at(ds_, t, tile) + from);
    }
  }

  // s of every iteration and the sums of v before each; the last iteration's ds.
  void prepare(int64_t tile) {
    const int64_t image = tile * kLanes, images = tiles_.images(tile), outputs = s_.outputs();
    std::memset(at(total_, 0, tile), 0, size_t(tiles_.outputs) * sizeof(float));
    for (int t = 0; t <= last_; ++t) {
      float* s = at(raw_, t, tile);
      to_lanes(p_.s + (t * s_.batch + image) * outputs, outputs, images, outputs, s);
      if (t == last_) break;
      float* next = at(total_, t + 1, tile);
      for (int64_t o = 0; o < s_.out_caps; ++o)
        squash_lanes(s + o * s_.out_dim * kLanes, s_.out_dim, next + o * s_.out_dim * kLanes);
      add_all(at(total_, t, tile), next, tiles_.outputs);
    }
    to_lanes(static_cast<const T*>(p_.grad) + image * outputs, outputs, images, outputs, at(dv_, 0, tile));
    squash_gradient(last_, tile);
    std::memset(at(dv_, 0, tile), 0, size_t(tiles_.outputs) * sizeof(float));
  }

  // A chunk's share of the gradient of the sum of v before iteration t.
  void total_gradient(int t, int64_t chunk, int64_t tile) {
    float* sum = parts_.data() + (chunk * tiles_.count + tile) * tiles_.outputs;
    float *votes = thread_scratch(size_t(tiles_.outputs + 2 * s_.out_caps * kLanes)),
          *coupling = votes + tiles_.outputs, *gradient = coupling + s_.out_caps * kLanes;
    std::memset(sum, 0, size_t(tiles_.outputs) * sizeof(float));
    for (int64_t i = chunks_.first(chunk); i < chunks_.last(chunk); ++i) {
      make_votes(s_, capsule(tile, i), weight(i), votes);
      logit_gradients(t, tile, votes, coupling, gradient);
      add_scaled(s_, gradient, votes, sum);
    }
  }

  // The coupling coefficients of iteration t > 0 and the gradients of its logits.
  void logit_gradients(int t, int64_t tile, const float* votes, float* coupling, float* gradient) {
    agreements(s_, votes, at(total_, t, tile), coupling);
    couple(s_, coupling);
    agreements(s_, votes, at(ds_, t, tile), gradient);
    uncouple(s_, coupling, gradient);
  }

  // ds of iteration t - 1: its v is in the sums before iteration t and all later ones.
  void step_back(int t, int64_t tile) {
    for (int64_t chunk = 0; chunk < chunks_.count; ++chunk)
      add_all(parts_.data() + (chunk * tiles_.count + tile) * tiles_.outputs, at(dv_, 0, tile),
              tiles_.outputs);
    squash_gradient(t - 1, tile);
  }

  void bias_gradient() {
    for (int64_t i = 0; i < s_.outputs(); ++i) {
      double total = 0;
      for (int t = first_iteration(); t <= last_; ++t)
        for (int64_t tile = 0; tile < tiles_.count; ++tile)
          for (int64_t image = 0; image < tiles_.images(tile); ++image)
            total += at(ds_, t, tile)[i * kLanes + image];
      p_.dbias[i] = float(total);
    }
  }

  void gradients(int64_t chunk) {
    const int64_t inputs = s_.in_dim * kLanes, row = round_up(s_.outputs(), kLanes);
    float* votes =
        thread_scratch(size_t(2 * tiles_.outputs + 2 * s_.out_caps * kLanes + inputs + row * kLanes));
    float *dvotes = votes + tiles_.outputs, *coupling = dvotes + tiles_.outputs,
          *gradient = coupling + s_.out_caps * kLanes, *du = gradient + s_.out_caps * kLanes,
          *rows = du + inputs;
    for (int64_t tile = 0; tile < tiles_.count; ++tile)
      for (int64_t i = chunks_.first(chunk); i < chunks_.last(chunk); ++i) {
        make_votes(s_, capsule(tile, i), weight(i), votes);
        vote_gradients(tile, votes, dvotes, coupling, gradient);
        if (p_.du) input_gradient(tile, i, dvotes, du);
        if (!p_.dw) continue;
        from_lanes(dvotes, s_.outputs(), kLanes, rows, row);
        weight_gradient(tile, i, rows, row);
      }
  }

  // The votes' gradient: of every iteration c ds + db * the sum of v.
  void vote_gradients(int64_t tile, const float* votes, float* dvotes, float* coupling, float* gradient) {
    std::memset(dvotes, 0, size_t(tiles_.outputs) * sizeof(float));
    for (int t = first_iteration(); t <= last_; ++t) {
      if (t == 0) {
        const V c = set(first_coupling(s_));
        for (int64_t k = 0; k < tiles_.outputs; k += kLanes)
          store(dvotes + k, fmadd(c, load(at(ds_, 0, tile) + k), load(dvotes + k)));
        continue;
      }
      logit_gradients(t, tile, votes, coupling, gradient);
      add_scaled(s_, coupling, at(ds_, t, tile), dvotes);
      if (!p_.detach) add_scaled(s_, gradient, at(total_, t, tile), dvotes);
    }
  }

  void input_gradient(int64_t tile, int64_t i, const float* dvotes, float* du) const {
    int64_t d = 0;
    for (; d + 4 <= s_.in_dim; d += 4)
      some_input_gradients<4>(weight(i) + d * s_.out_dim, dvotes, du + d * kLanes);
    for (; d < s_.in_dim; ++d) some_input_gradients<1>(weight(i) + d * s_.out_dim, dvotes, du + d * kLanes);
    const int64_t columns = s_.in_caps * s_.in_dim;
    from_lanes(du, s_.in_dim, tiles_.images(tile),
               static_cast<T*>(p_.du) + tile * kLanes * columns + i * s_.in_dim, columns);
  }

  // Two sums a coordinate: one chain of additions would wait for itself.
  template <int kCount>
  void some_input_gradients(const float* w, const float* dvotes, float* du) const {
    V sum[2][kCount];
    for (int k = 0; k < kCount; ++k) sum[0][k] = sum[1][k] = zero();
    const auto step = [&](int64_t e, V(&into)[kCount]) {
      const V g = load(dvotes + e * kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) into[k] = fmadd(set(w[k * s_.out_dim + e]), g, into[k]);
    };
    for (int64_t o = 0; o < s_.out_caps; ++o, w += s_.in_dim * s_.out_dim, dvotes += s_.out_dim * kLanes) {
      int64_t e = 0;
      for (; e + 2 <= s_.out_dim; e += 2) {
        step(e, sum[0]);
        step(e + 1, sum[1]);
      }
      if (e < s_.out_dim) step(e, sum[0]);
    }
    for (int k = 0; k < kCount; ++k) store(du + k * kLanes, add(sum[0][k], sum[1][k]));
  }

  // dW of one input capsule += u^T dvotes over a tile's images; rows [image][outputs].
  void weight_gradient(int64_t tile, int64_t i, const float* rows, int64_t row) {
    const float* u = capsule(tile, i);
    float* dw = p_.dw + i * s_.outputs() * s_.in_dim;
    for (int64_t o = 0; o < s_.out_caps; ++o, dw += s_.in_dim * s_.out_dim)
      for (int64_t e = 0; e < s_.out_dim; e += kLanes) {
        const int n = s_.out_dim - e < kLanes ? int(s_.out_dim - e) : kLanes;
        const float* from = rows + o * s_.out_dim + e;
        int64_t d = 0;
        for (; d + 8 <= s_.in_dim; d += 8)
          some_weight_gradients<8>(u + d * kLanes, tile, from, row, dw + d * s_.out_dim + e, n);
        for (; d < s_.in_dim; ++d)
          some_weight_gradients<1>(u + d * kLanes, tile, from, row, dw + d * s_.out_dim + e, n);
      }
  }

  template <int kCount>
  void some_weight_gradients(const float* u, int64_t tile, const float* rows, int64_t row, float* dw,
                             int n) const {
    V acc[kCount];
#pragma GCC unroll 8
    for (int d = 0; d < kCount; ++d) acc[d] = tile ? load(dw + d * s_.out_dim, n) : zero();
    for (int64_t image = 0; image < tiles_.images(tile); ++image) {
      const V g = load(rows + image * row, n);
#pragma GCC unroll 8
      for (int d = 0; d < kCount; ++d) acc[d] = fmadd(set(u[d * kLanes + image]), g, acc[d]);
    }
#pragma GCC unroll 8
    for (int d = 0; d < kCount; ++d) store(dw + d * s_.out_dim, acc[d], n);
  }

  const CapsuleBackward& p_;
  const CapsuleShape& s_;
  const CapsuleChunks chunks_;
  const ImageTiles tiles_;
  const int last_;
  const int64_t plane_;  // floats of a tensor of output capsules, in tiles
  AlignedBuffer<float> u_, ds_;
  AlignedBuffer<float> total_;  // of v before each iteration
  AlignedBuffer<float> raw_;    // s
  AlignedBuffer<float> dv_;
  AlignedBuffer<float> parts_;
};

void capsule_backward(const CapsuleBackward& p) {
  by_dtype(p.shape.dtype, &Kernels::capsule_backward, p, [&](auto t) { Backward<decltype(t)>(p).run(); });
}

}  // namespace

namespace FASTCNN_ISA {
void register_capsule_backward(Kernels& k) { k.capsule_backward = capsule_backward; }
}  // namespace FASTCNN_ISA

}  // namespace fastcnn
