// The router's backward pass on a CPU. Tokens are read once for both products: the gate's gradient
// dz^T (w x), and that of x, w (dz gate).

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gemm.h"
#include "matmul.h"
#include "memory.h"
#include "router.h"
#include "softmax.h"

namespace molex::router {
namespace {

// What one pass needs to know of the logits [T, E] and of the choice [T, K].
struct Choice {
  const float *logits, *weight;
  const int64_t* index;
  const float *grad_weight, *grad_logits;  // null where there is none
  int64_t experts, top_k;
  Score score;
};

// Gradient of the logits of one token, from those of the scores and of the logits themselves.
void logits_gradient(const Choice& c, int64_t t, float* dz, float* probability) {
  if (c.grad_logits) {
    std::copy_n(c.grad_logits + t * c.experts, c.experts, dz);
  } else {
    std::fill_n(dz, c.experts, 0.0f);
  }
  if (!c.grad_weight) return;
  const float *g = c.grad_weight + t * c.top_k, *s = c.weight + t * c.top_k;
  float along = 0.0f;
  for (int64_t k = 0; k < c.top_k; ++k) along += g[k] * s[k];
  for (int64_t k = 0; k < c.top_k; ++k) {
    const float slope = c.score == Score::kSigmoid ? 1.0f - s[k] : 1.0f;
    dz[c.index[t * c.top_k + k]] += s[k] * (c.score == Score::kChosen ? g[k] - along : g[k] * slope);
  }
  if (c.score == Score::kSoftmax) {
    softmax_of(c.logits + t * c.experts, probability, c.experts);
    add_scaled(dz, probability, -along, c.experts);
  }
}

// Gradients of x, the gate and its bias; those not needed are empty. Sums over tokens go to chunks of a size
// that depends on the shape alone, which are added in order.
std::tuple<Tensor, Tensor, Tensor> router_bwd_cpu(const Tensor& x,
                                                  const Tensor& gate,
                                                  const Tensor& logits,
                                                  const Tensor& index,
                                                  const Tensor& weight,
                                                  std::optional<Tensor> grad_weight,
                                                  std::optional<Tensor> grad_logits,
                                                  std::optional<Tensor> table,
                                                  std::optional<Tensor> labels,
                                                  std::optional<Tensor> mix,
                                                  std::string score,
                                                  std::vector<bool> needs) {
  const int64_t tokens = x.size(0), width = x.size(1), experts = gate.size(0), top_k = index.size(1);
  const bool needs_x = needs[0], needs_gate = needs[1], needs_bias = needs[2];
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
                      experts,
                      top_k,
                      score_of(score)};
  const Source given = source_of(kept[3]);

  const int64_t chunk = std::max<int64_t>(10 * kPiece, (8 * experts + kPiece - 1) / kPiece * kPiece);
  const int64_t chunks = (tokens + chunk - 1) / chunk, blocks = (width + kFeatures - 1) / kFeatures;
  Tensor dx = needs_x ? new_result(x, {tokens, width}) : new_result(x, {0});
  Tensor dgate = needs_gate ? new_result(gate, {experts, width}) : new_result(gate, {0});
  Tensor dbias = new_result(logits, {needs_bias ? experts : 0}, ScalarType::Float);
  Tensor dlogits = new_result(logits, {tokens, experts}, ScalarType::Float);
  Tensor partial = new_result(logits, {needs_gate ? chunks * experts * width : 0}, ScalarType::Float);
  float *dz = dlogits.mutable_data_ptr<float>(), *sums = partial.mutable_data_ptr<float>();

  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / experts), [&](int64_t begin, int64_t end) {
        std::vector<float> probability(wide_of(experts));
        for (int64_t t = begin; t < end; ++t) {
          logits_gradient(choice, t, dz + t * experts, probability.data());
        }
      });

  const Target to = target_of(dx);
  const bool direct = from.plain() && to.dtype == ScalarType::Float;
  const int64_t most = std::min(kFeatures, width), grain = tokens * width < kGrain ? chunks * blocks : 1;
  if (needs_x || needs_gate) {
    torch::stable::parallel_for(0, chunks * blocks, grain, [&](int64_t begin, int64_t end) {
      Arena arena(Arena::bytes(experts * most) + 2 * Arena::bytes(kPiece * most) + Arena::bytes(most));
      float *right = arena.floats(experts * most), *tile = arena.floats(kPiece * most);
      float *made = arena.floats(kPiece * most), *scratch = arena.floats(most);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / blocks, feature = task % blocks * kFeatures;
        const int64_t features = std::min(kFeatures, width - feature);
        for (int64_t e = 0; e < experts && needs_x; ++e) {
          float* row = right + e * features;
          const float* there = read(given, e * width + feature, features, row);
          if (there != row) std::copy_n(there, features, row);
        }
        const int64_t stop = std::min(tokens, (part + 1) * chunk);
        for (int64_t first = part * chunk; first < stop; first += kPiece) {
          const int64_t count = std::min(kPiece, stop - first);
          const float* upstream_here = dz + first * experts;
          if (needs_gate) {
            const Rows left = from.weighed(first, count, feature, features, tile);
            product_turned(upstream_here,
                           experts,
                           left.data,
                           left.stride,
                           sums + part * experts * width + feature,
                           width,
                           experts,
                           features,
                           count,
                           first > part * chunk);
          }
          if (!needs_x) continue;
          float* out = direct ? static_cast<float*>(to.data) + first * width + feature : made;
          product(upstream_here,
                  experts,
                  right,
                  features,
                  out,
                  direct ? width : features,
                  count,
                  features,
                  experts,
                  false);
          if (direct) continue;
          for (int64_t t = 0; t < count; ++t) {
            const int64_t at = (first + t) * width + feature;
            float *row = made + t * features, *there = place(to, at, row);
            if (from.weighted())
              multiply(there, row, from.weights(first + t, feature, features, scratch), features);
            write(to, at, features, there);
          }
        }
      }
    });
  }

  if (needs_gate) {
    const Target there = target_of(dgate);
    torch::stable::parallel_for(
        0, experts, std::max<int64_t>(1, kGrain / (width * chunks + 1)), [&](int64_t begin, int64_t end) {
          std::vector<float> scratch(width);
          for (int64_t e = begin; e < end; ++e) {
            float* row = place(there, e * width, scratch.data());
            std::fill_n(row, width, 0.0f);
            for (int64_t part = 0; part < chunks; ++part)
              add(row, sums + (part * experts + e) * width, width);
            write(there, e * width, width, row);
          }
        });
  }
  if (needs_bias) {
    std::vector<double> parts(chunks * experts, 0.0), total(experts, 0.0);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * chunk; t < std::min(end * chunk, tokens); ++t) {
        double* sum = parts.data() + t / chunk * experts;
        for (int64_t e = 0; e < experts; ++e) sum[e] += dz[t * experts + e];
      }
    });
    for (size_t i = 0; i < parts.size(); ++i) total[i % experts] += parts[i];
    std::copy(total.begin(), total.end(), dbias.mutable_data_ptr<float>());
  }
  return {dx, dgate, dbias};
}

}  // namespace
}  // namespace molex::router

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("router_bwd_cpu", TORCH_BOX(&molex::router::router_bwd_cpu));
}
