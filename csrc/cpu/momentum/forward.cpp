// Momentum over the experts' outputs: combine, dropout, step and LayerNorm in one pass.

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/common/layer_norm.h"
#include "cpu/common/memory.h"
#include "cpu/common/philox.h"
#include "cpu/momentum/correction.h"
#include "cpu/momentum/rules.h"
#include "registration.h"

namespace molex::momentum {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> momentum_fwd(const Tensor& x,
                                                                        const Tensor& f,
                                                                        std::optional<Tensor> f_prev,
                                                                        std::optional<Tensor> s0,
                                                                        std::optional<Tensor> s1,
                                                                        std::optional<Tensor> s2,
                                                                        std::optional<Tensor> expert_weight,
                                                                        std::optional<Tensor> offsets,
                                                                        std::optional<Tensor> inverse,
                                                                        std::optional<Tensor> norm_weight,
                                                                        std::optional<Tensor> norm_bias,
                                                                        std::optional<Tensor> mu,
                                                                        std::optional<Tensor> gamma,
                                                                        std::optional<Tensor> seed,
                                                                        std::vector<double> numbers,
                                                                        std::string kind,
                                                                        int64_t num_states,
                                                                        std::optional<double> norm_eps,
                                                                        double dropout_p,
                                                                        int64_t sample_tokens,
                                                                        bool keeps_f) {
  const int64_t tokens = x.size(0), width = x.size(1), total = tokens * width;
  const Numbers c = numbers_of(numbers, mu, gamma);
  const Rule& rule = rule_of(kind);
  const Dropout dropping(seed, dropout_p);

  const std::optional<Tensor> held[] = {
      torch::stable::contiguous(x), torch::stable::contiguous(f), packed(s0), packed(s1), packed(s2)};
  const Source from_x = source_of(held[0]), from_f = source_of(held[1]);
  const Source from_s[] = {source_of(held[2]), source_of(held[3]), source_of(held[4])};
  const ScalarType state_dtype = s0 ? s0->scalar_type() : ScalarType::Float;

  Tensor y = new_result(x, {tokens, width});
  std::vector<Tensor> states;
  for (int64_t i = 0; i < 3; ++i) {
    states.push_back(i < num_states ? new_result(x, {tokens, width}, state_dtype)
                                    : new_result(x, {0}, state_dtype));
  }
  Tensor kept = keeps_f ? new_result(f, {tokens, width}) : torch::stable::new_empty(f, {0});
  const Target to_y = target_of(y), to_kept = target_of(kept);
  const Target to_n[] = {target_of(states[0]), target_of(states[1]), target_of(states[2])};

  const std::optional<Tensor> weight_of_norm = packed(norm_weight), bias_of_norm = packed(norm_bias);
  Scratch parameters(2, norm_eps ? width : 0);
  const float* scale = nullptr;
  const float* shift = nullptr;
  if (norm_eps && weight_of_norm) scale = read(source_of(weight_of_norm), 0, width, parameters[0]);
  if (norm_eps && bias_of_norm) shift = read(source_of(bias_of_norm), 0, width, parameters[1]);

  const bool combined = expert_weight.has_value();
  const int64_t top_k = combined ? expert_weight->size(1) : 0;
  const std::optional<Tensor> weights = packed(expert_weight), rows = packed(inverse);
  std::vector<float> gates_scratch(combined ? tokens * top_k : 0);
  const float* gates = nullptr;
  const int64_t* row_of = nullptr;
  int64_t local_rows = 0;
  if (combined) {
    gates = read(source_of(weights), 0, tokens * top_k, gates_scratch.data());
    row_of = rows->const_data_ptr<int64_t>();
    const Tensor ends = torch::stable::contiguous(*offsets);
    local_rows = ends.const_data_ptr<int32_t>()[ends.size(0) - 1];
  }

  std::optional<Correction> correction;
  if (kind == "mars") correction.emplace(f, f_prev, c.variance_reduction, sample_tokens);
  Tensor squares = correction ? correction->sum_squares(x) : new_result(x, {0}, ScalarType::Float);

  const int64_t span = combined || correction || norm_eps ? width : kSpan;
  const int64_t spans = (total + span - 1) / span;
  torch::stable::parallel_for(0, spans, std::max<int64_t>(1, kGrain / span), [&](int64_t begin, int64_t end) {
    Scratch scratch(11, span);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * span, count = std::min(span, total - first);
      const float* mine = nullptr;
      if (combined) {
        float* sum = scratch[1];
        bool any = false;
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t row = row_of[index * top_k + k];
          if (row >= local_rows) continue;
          const float* one = read(from_f, row * width, count, scratch[0]);
          any ? add_scaled(sum, one, gates[index * top_k + k], count)
              : scale_into(sum, one, gates[index * top_k + k], count);
          any = true;
        }
        if (!any) std::memset(sum, 0, count * sizeof(float));
        if (dropping.on) drop(dropping, sum, first, count);
        mine = sum;
        if (keeps_f) {
          float* there = place(to_kept, first, sum);
          if (there != sum) std::memcpy(there, sum, count * sizeof(float));
          write(to_kept, first, count, sum);
        }
      } else {
        mine = read(from_f, first, count, scratch[1]);
        if (correction) mine = correction->clipped(scratch[1], mine, index, scratch[10]);
      }
      Forward a{};
      a.x = read(from_x, first, count, scratch[2]);
      a.f = mine;
      if (from_s[0]) a.s0 = read(from_s[0], first, count, scratch[3]);
      if (from_s[1]) a.s1 = read(from_s[1], first, count, scratch[4]);
      if (from_s[2]) a.s2 = read(from_s[2], first, count, scratch[5]);
      a.y = place(to_y, first, scratch[6]);
      float* const n[] = {place(to_n[0], first, scratch[7]),
                          num_states > 1 ? place(to_n[1], first, scratch[8]) : nullptr,
                          num_states > 2 ? place(to_n[2], first, scratch[9]) : nullptr};
      a.n0 = n[0], a.n1 = n[1], a.n2 = n[2];
      rule.forward(a, count, c);
      if (norm_eps) {
        normalise(a.y, count, static_cast<float>(*norm_eps));
        scale_and_shift(a.y, scale, shift, count);
      }
      write(to_y, first, count, a.y);
      for (int64_t i = 0; i < num_states; ++i) write(to_n[i], first, count, n[i]);
    }
  });
  return {y, states[0], states[1], states[2], kept, squares};
}

}  // namespace

}  // namespace molex::momentum

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("momentum_fwd", molex::cpu_kernel<&molex::momentum::momentum_fwd>);
}
