// The choice of experts by given logits, forward and backward.

#include "cpu/routing/choice.h"

#include <tuple>

#include "cpu/common/memory.h"
#include "registration.h"

namespace molex::router {
namespace {

constexpr int64_t kGrain = 8192;  // logits below which a thread is not worth waking

int64_t blocks_at_once(int64_t experts) { return std::max<int64_t>(1, kGrain / (kTogether * (experts + 1))); }

int64_t blocks_of(int64_t tokens) { return (tokens + kTogether - 1) / kTogether; }

// Writes ids, and -1 in the place of those outside [0, limit).
template <class Index>
void write_ids(const Index* from, int64_t count, int64_t limit, int64_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = from[i];
    to[i] = id >= 0 && id < limit ? id : -1;
  }
}

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
  const std::optional<Tensor> ids = packed(given);
  const bool is_long = ids && ids->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(!ids || is_long || ids->scalar_type() == ScalarType::Int,
                  "given: expected dtype int64 or int32");
  const Tensor rows = torch::stable::contiguous(logits);
  Tensor index = new_result(logits, {tokens, top_k}, ScalarType::Long);
  Tensor weight = new_result(logits, {tokens, top_k}, ScalarType::Float);
  const float* z = rows.const_data_ptr<float>();
  int64_t* chosen = index.mutable_data_ptr<int64_t>();
  float* weights = weight.mutable_data_ptr<float>();
  const int64_t grain = blocks_at_once(experts);
  torch::stable::parallel_for(0, blocks_of(tokens), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(find_top_k.size());
    for (int64_t t = begin * kTogether; t < std::min(end * kTogether, tokens); t += kTogether) {
      const int64_t count = std::min(kTogether, tokens - t), at = t * top_k;
      const float* const block = z + t * experts;
      if (!ids) {
        find_top_k(block, experts, count, chosen + at, weights + at, scratch.data());
        continue;
      }
      if (is_long) {
        write_ids(ids->const_data_ptr<int64_t>() + at, count * top_k, experts, chosen + at);
      } else {
        write_ids(ids->const_data_ptr<int32_t>() + at, count * top_k, experts, chosen + at);
      }
      find_top_k.given(block, experts, count, chosen + at, weights + at, scratch.data());
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
  const int64_t grain = kTogether * blocks_at_once(experts);
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
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
