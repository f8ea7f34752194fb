// The choice of experts by given logits, forward and backward.

#include "cpu/routing/choice.h"

#include <tuple>

#include "cpu/common/memory.h"
#include "registration.h"

namespace molex::router {
namespace {

constexpr int64_t kTogether = 8192;  // logits below which a thread is not worth waking

int64_t tokens_at_once(int64_t experts) { return std::max<int64_t>(1, kTogether / (experts + 1)); }

// expert_index [T, K], with -1 for a given id outside [0, E), and expert_weight [T, K].
std::tuple<Tensor, Tensor> choice_fwd(const Tensor& logits,
                                      std::optional<Tensor> expert_bias,
                                      std::optional<Tensor> given,
                                      int64_t top_k,
                                      std::string score,
                                      int64_t num_groups,
                                      int64_t top_groups,
                                      bool renormalize,
                                      double scaling) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const TopK find_top_k(expert_bias, experts, top_k, {num_groups, top_groups}, {score, renormalize, scaling});
  const std::vector<int64_t> ids = given ? labels_of(*given, experts) : std::vector<int64_t>();
  const Tensor rows = torch::stable::contiguous(logits);
  Tensor index = new_result(logits, {tokens, top_k}, ScalarType::Long);
  Tensor weight = new_result(logits, {tokens, top_k}, ScalarType::Float);
  const float* z = rows.const_data_ptr<float>();
  int64_t* chosen = index.mutable_data_ptr<int64_t>();
  float* weights = weight.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tokens, tokens_at_once(experts), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(find_top_k.size());
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = t * top_k;
      if (given) {
        find_top_k.given(z + t * experts, &ids[at], chosen + at, weights + at, scratch.data());
      } else {
        find_top_k(z + t * experts, chosen + at, weights + at, scratch.data());
      }
    }
  });
  return {index, weight};
}

Tensor choice_bwd(const Tensor& grad_weight,
                  const Tensor& logits,
                  const Tensor& index,
                  const Tensor& weight,
                  std::string score,
                  bool renormalize,
                  double scaling) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Tensor kept[] = {torch::stable::contiguous(logits),
                         torch::stable::contiguous(weight),
                         torch::stable::contiguous(index),
                         torch::stable::contiguous(grad_weight)};
  const Choice choice{kept[0].const_data_ptr<float>(),
                      kept[1].const_data_ptr<float>(),
                      kept[2].const_data_ptr<int64_t>(),
                      kept[3].const_data_ptr<float>(),
                      nullptr,
                      experts,
                      index.size(1),
                      {score, renormalize, scaling}};
  Tensor dlogits = new_result(logits, {tokens, experts}, ScalarType::Float);
  float* dz = dlogits.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, tokens, tokens_at_once(experts), [&](int64_t begin, int64_t end) {
    std::vector<float> probability(wide_of(experts));
    for (int64_t t = begin; t < end; ++t) logits_gradient(choice, t, dz + t * experts, probability.data());
  });
  return dlogits;
}

}  // namespace
}  // namespace molex::router

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("choice_fwd", molex::cpu_kernel<&molex::router::choice_fwd>);
  library.impl("choice_bwd", molex::cpu_kernel<&molex::router::choice_bwd>);
}
