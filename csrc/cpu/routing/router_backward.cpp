// The router's backward pass on a CPU. Tokens are read once for both products: the gate's gradient
// dz^T (w x), and that of x, w (dz gate).

#include <string>
#include <tuple>

#include "cpu/common/gemm.h"
#include "cpu/common/matmul.h"
#include "cpu/common/memory.h"
#include "cpu/routing/choice.h"
#include "cpu/routing/router.h"
#include "registration.h"

namespace molex::router {
namespace {

// Sums over tokens go to chunks, which are added in order. Their size depends on the shape alone.
struct Shape {
  int64_t tokens, width, experts;
  int64_t chunk = std::max<int64_t>(10 * kPiece, parts(8 * experts, kPiece) * kPiece);
  int64_t chunks = parts(tokens, chunk);
};

// dx = w (dz gate) if `to` is given, and the sums dz^T (w x) [chunks, E, D] of each chunk if `sums` are.
void multiply_back(
    const Shape& n, const float* dz, const Tokens& from, const Source& gate, const Target& to, float* sums) {
  const bool direct = from.plain() && to.dtype == ScalarType::Float;
  const int64_t blocks = parts(n.width, kFeatures), most = std::min(kFeatures, n.width);
  const int64_t grain = n.tokens * n.width < kGrain ? n.chunks * blocks : 1;
  torch::stable::parallel_for(0, n.chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    Arena arena(Arena::bytes(n.experts * most) + 2 * Arena::bytes(kPiece * most) + Arena::bytes(most));
    float *weights = arena.floats(n.experts * most), *tile = arena.floats(kPiece * most);
    float *made = arena.floats(kPiece * most), *scratch = arena.floats(most);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, feature = task % blocks * kFeatures;
      const int64_t features = std::min(kFeatures, n.width - feature);
      for (int64_t e = 0; e < n.experts && to; ++e) {
        float* row = weights + e * features;
        const float* there = read(gate, e * n.width + feature, features, row);
        if (there != row) std::copy_n(there, features, row);
      }
      const int64_t start = part * n.chunk, stop = std::min(n.tokens, start + n.chunk);
      for (int64_t first = start; first < stop; first += kPiece) {
        const int64_t count = std::min(kPiece, stop - first);
        const float* upstream = dz + first * n.experts;
        if (sums) {
          const Rows x = from.weighted_rows(first, count, feature, features, tile);
          float* sum = sums + part * n.experts * n.width + feature;
          const bool more = first > start;
          product_transposed(
              {upstream, n.experts, x.data, x.stride, sum, n.width, n.experts, features, count, more});
        }
        if (!to) continue;
        float* out = direct ? place(to, first * n.width + feature, made) : made;
        const int64_t stride = direct ? n.width : features;
        product({upstream, n.experts, weights, features, out, stride, count, features, n.experts, false});
        for (int64_t t = 0; t < count && !direct; ++t) {
          const int64_t at = (first + t) * n.width + feature;
          float *row = made + t * features, *there = place(to, at, row);
          if (from.weighted()) {
            multiply(there, row, from.weights(first + t, feature, features, scratch), features);
          }
          write(to, at, features, there);
        }
      }
    }
  });
}

// The chunks' sums, added in order.
void add_chunks(const Shape& n, const float* sums, const Target& to) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (n.width * n.chunks + 1));
  torch::stable::parallel_for(0, n.experts, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(n.width);
    for (int64_t e = begin; e < end; ++e) {
      float* row = place(to, e * n.width, scratch.data());
      std::fill_n(row, n.width, 0.0f);
      for (int64_t part = 0; part < n.chunks; ++part)
        add(row, sums + (part * n.experts + e) * n.width, n.width);
      write(to, e * n.width, n.width, row);
    }
  });
}

// sum_t dz_te
void sum_tokens(const Shape& n, const float* dz, float* out) {
  std::vector<double> sums(n.chunks * n.experts, 0.0), total(n.experts, 0.0);
  torch::stable::parallel_for(0, n.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * n.chunk; t < std::min(end * n.chunk, n.tokens); ++t) {
      double* sum = sums.data() + t / n.chunk * n.experts;
      for (int64_t e = 0; e < n.experts; ++e) sum[e] += dz[t * n.experts + e];
    }
  });
  for (size_t i = 0; i < sums.size(); ++i) total[i % n.experts] += sums[i];
  std::copy(total.begin(), total.end(), out);
}

// Gradients of x, the gate and its bias; those not needed are empty.
std::tuple<Tensor, Tensor, Tensor> router_bwd(std::optional<Tensor> grad_weight,
                                              std::optional<Tensor> grad_logits,
                                              const Tensor& x,
                                              const Tensor& gate,
                                              const Tensor& logits,
                                              const Tensor& index,
                                              const Tensor& weight,
                                              std::optional<Tensor> table,
                                              std::optional<Tensor> labels,
                                              std::optional<Tensor> mix,
                                              std::string score,
                                              bool renormalize,
                                              double scaling,
                                              std::vector<bool> needs) {
  const Shape n{x.size(0), x.size(1), gate.size(0)};
  const Tokens from(x, table, labels, mix);
  const Tensor kept[] = {torch::stable::contiguous(logits),
                         torch::stable::contiguous(weight),
                         torch::stable::contiguous(index),
                         torch::stable::contiguous(gate)};
  const std::optional<Tensor> upstream[] = {packed(grad_weight), packed(grad_logits)};
  const Choice choice{kept[0].const_data_ptr<float>(),
                      kept[1].const_data_ptr<float>(),
                      kept[2].const_data_ptr<int64_t>(),
                      upstream[0] ? upstream[0]->const_data_ptr<float>() : nullptr,
                      upstream[1] ? upstream[1]->const_data_ptr<float>() : nullptr,
                      n.experts,
                      index.size(1),
                      {score, renormalize, scaling}};
  const bool needs_x = needs[0], needs_gate = needs[1], needs_bias = needs[2];
  Tensor dx = needs_x ? new_result(x, {n.tokens, n.width}) : new_result(x, {0});
  Tensor dgate = needs_gate ? new_result(gate, {n.experts, n.width}) : new_result(gate, {0});
  Tensor dbias = new_result(logits, {needs_bias ? n.experts : 0}, ScalarType::Float);
  Tensor dlogits = new_result(logits, {n.tokens, n.experts}, ScalarType::Float);
  Tensor partial = new_result(logits, {needs_gate ? n.chunks * n.experts * n.width : 0}, ScalarType::Float);
  float *dz = dlogits.mutable_data_ptr<float>(), *sums = partial.mutable_data_ptr<float>();

  const int64_t grain = std::max<int64_t>(1, kGrain / (n.experts + 1));
  torch::stable::parallel_for(0, n.tokens, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> probability(wide_of(n.experts));
    for (int64_t t = begin; t < end; ++t) logits_gradient(choice, t, dz + t * n.experts, probability.data());
  });
  if (needs_x || needs_gate) {
    const Target to = needs_x ? target_of(dx) : Target{};
    multiply_back(n, dz, from, source_of(kept[3]), to, needs_gate ? sums : nullptr);
  }
  if (needs_gate) add_chunks(n, sums, target_of(dgate));
  if (needs_bias) sum_tokens(n, dz, dbias.mutable_data_ptr<float>());
  return {dx, dgate, dbias};
}

}  // namespace
}  // namespace molex::router

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("router_bwd", molex::cpu_kernel<&molex::router::router_bwd>);
}
