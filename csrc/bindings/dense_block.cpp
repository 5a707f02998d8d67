// Dense blocks.
#include "ops/dense_block.h"

#include "bindings/arguments.h"

namespace fastcnn {
namespace {

// (weight, bias, mean, var, eps, trains, applied)
DenseNorm dense_norm(const py::tuple& t) {
  DenseNorm n;
  n.weight = floats(t[0].cast<Pointer>());
  n.bias = floats(t[1].cast<Pointer>());
  n.mean = floats(t[2].cast<Pointer>());
  n.var = floats(t[3].cast<Pointer>());
  n.eps = t[4].cast<float>();
  n.trains = t[5].cast<bool>();
  n.applied = mutable_floats(t[6].cast<Pointer>());
  return n;
}

// (norm1, weight1, norm2, weight2, middle, mid, mid_mean, mid_var)
DenseLayer dense_layer(const py::tuple& t) {
  DenseLayer layer;
  layer.norm1 = dense_norm(t[0]);
  layer.weight1 = conv2d_weight(t[1]);
  layer.norm2 = dense_norm(t[2]);
  layer.weight2 = conv2d_weight(t[3]);
  layer.middle = t[4].cast<int64_t>();
  layer.mid = reinterpret_cast<void*>(t[5].cast<Pointer>());
  layer.mid_mean = mutable_floats(t[6].cast<Pointer>());
  layer.mid_var = mutable_floats(t[7].cast<Pointer>());
  return layer;
}

// (images, height, width, channels, growth, dtype, buffer)
DenseBlock dense_block(const py::tuple& t, const std::vector<py::tuple>& layers) {
  DenseBlock b;
  int64_t* sizes[] = {&b.images, &b.height, &b.width, &b.channels, &b.growth};
  for (int i = 0; i < 5; ++i) *sizes[i] = t[i].cast<int64_t>();
  b.dtype = dtype_of(t[5].cast<int>());
  b.buffer = reinterpret_cast<void*>(t[6].cast<Pointer>());
  for (const py::tuple& layer : layers) b.layers.push_back(dense_layer(layer));
  return b;
}

// (dweight1, sums1, dscale1, dweight2, dweight2_layout, sums2, dscale2)
DenseLayerGradient dense_gradient(const py::tuple& t) {
  DenseLayerGradient g;
  g.dweight1 = mutable_floats(t[0].cast<Pointer>());
  g.sums1 = mutable_floats(t[1].cast<Pointer>());
  g.dscale1 = mutable_floats(t[2].cast<Pointer>());
  g.dweight2 = mutable_floats(t[3].cast<Pointer>());
  g.dweight2_layout = conv2d_weight(t[4]);
  g.sums2 = mutable_floats(t[5].cast<Pointer>());
  g.dscale2 = mutable_floats(t[6].cast<Pointer>());
  return g;
}

}  // namespace

void bind_dense_block(py::module_& m) {
  m.def("dense_block_forward", [](const py::tuple& block, const std::vector<py::tuple>& layers, Pointer mean,
                                  Pointer var, bool finishes) {
    launch(dense_block_forward, DenseBlockForward{dense_block(block, layers), mutable_floats(mean),
                                                  mutable_floats(var), finishes});
  });
  m.def("dense_block_backward", [](const py::tuple& block, const std::vector<py::tuple>& layers, Pointer mean,
                                   bool repeats, const std::vector<py::tuple>& gradients, Pointer grad,
                                   int64_t grad_ld, Pointer total, Pointer dmid, Pointer dx) {
    DenseBlockBackward p;
    p.block = dense_block(block, layers);
    p.mean = floats(mean);
    p.repeats = repeats;
    for (const py::tuple& own : gradients) p.gradients.push_back(dense_gradient(own));
    p.grad = activations(grad, grad_ld);
    p.total = reinterpret_cast<void*>(total);
    p.dmid = reinterpret_cast<void*>(dmid);
    p.dx = reinterpret_cast<void*>(dx);
    launch(dense_block_backward, p);
  });
}

}  // namespace fastcnn
