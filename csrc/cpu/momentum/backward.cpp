// The gradient of momentum, in one pass. With a norm, the norm's input is recomputed.

#include <algorithm>
#include <tuple>

#include "cpu/common/layer_norm.h"
#include "cpu/common/memory.h"
#include "cpu/common/philox.h"
#include "cpu/momentum/correction.h"
#include "cpu/momentum/rules.h"
#include "registration.h"

namespace molex::momentum {

namespace {

constexpr int64_t kChunks = 64;  // partial sums of the parameters' gradients

constexpr auto add_sum =
    versions([](auto registers, double* to, const float* values, int64_t count)
                 MOLEX_LAMBDA_INLINE { *to += sum_of<registers.kLanes>(values, count); });

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> momentum_bwd(
    const Tensor& like,
    std::optional<Tensor> dy,
    std::optional<Tensor> g0,
    std::optional<Tensor> g1,
    std::optional<Tensor> g2,
    std::optional<Tensor> x,
    std::optional<Tensor> f,
    std::optional<Tensor> s0,
    std::optional<Tensor> s1,
    std::optional<Tensor> s2,
    std::optional<Tensor> norm_weight,
    std::optional<Tensor> mu,
    std::optional<Tensor> gamma,
    std::optional<Tensor> f_prev,
    std::optional<Tensor> squares,
    std::optional<Tensor> seed,
    std::vector<double> numbers,
    std::string kind,
    int64_t num_states,
    std::optional<double> norm_eps,
    double dropout_p,
    int64_t sample_tokens,
    bool from_state,
    ScalarType x_dtype,
    ScalarType f_dtype,
    ScalarType state_dtype,
    std::vector<bool> needs) {
  const int64_t tokens = like.size(0), width = like.size(1), total = tokens * width;
  const Numbers c = numbers_of(numbers, mu, gamma);
  const Rule& rule = rule_of(kind);
  const Dropout dropping(seed, dropout_p);

  constexpr int kDy = 0, kG0 = 1, kG1 = 2, kG2 = 3, kX = 4, kF = 5, kS0 = 6, kS1 = 7, kS2 = 8, kInputs = 9;
  const std::optional<Tensor> held[kInputs] = {packed(dy),
                                               packed(g0),
                                               packed(g1),
                                               packed(g2),
                                               packed(x),
                                               packed(f),
                                               packed(s0),
                                               packed(s1),
                                               packed(s2)};
  Source from[kInputs];
  for (int i = 0; i < kInputs; ++i) from[i] = source_of(held[i]);

  constexpr int kDx = 0, kDf = 1, kD0 = 2, kD1 = 3, kD2 = 4, kOutputs = 5;
  const ScalarType dtypes[kOutputs] = {x_dtype, f_dtype, state_dtype, state_dtype, state_dtype};
  std::vector<Tensor> gradients;
  Target to[kOutputs];
  for (int i = 0; i < kOutputs; ++i) {
    gradients.push_back(needs[i] ? new_result(like, {tokens, width}, dtypes[i])
                                 : new_result(like, {0}, dtypes[i]));
    if (needs[i]) to[i] = target_of(gradients[i]);
  }
  std::optional<Correction> correction;
  if (squares) {
    correction.emplace(*f, f_prev, c.variance_reduction, sample_tokens);
    correction->take_squares(*squares);
  }
  // With a correction, `df` is first that of the corrected f, which stays fp32 until it is corrected itself.
  const bool corrects = correction && needs[kDf];
  std::optional<Tensor> pushed;
  if (corrects && f_dtype != ScalarType::Float) {
    pushed = new_result(like, {tokens, width}, ScalarType::Float);
    to[kDf] = target_of(*pushed);
  }
  std::vector<float> products(corrects ? tokens : 0);
  const bool needs_norm = needs[5], needs_numbers = needs[6];
  const std::optional<Tensor> weight_of_norm = packed(norm_weight);
  Scratch parameters(1, norm_eps ? width : 0);
  const float* scale = nullptr;
  if (norm_eps && weight_of_norm) scale = read(source_of(weight_of_norm), 0, width, parameters[0]);

  const int64_t span = norm_eps || correction ? width : kSpan;
  const int64_t spans = (total + span - 1) / span;
  // The chunks, and so their sums, depend on the shape alone.
  const int64_t chunks = std::min(kChunks, spans);
  std::vector<float> norm_sums(needs_norm ? chunks * 2 * width : 0);
  std::vector<double> number_sums(chunks * 2);
  torch::stable::parallel_for(0, chunks, total < kGrain ? chunks : 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(kInputs + kOutputs + 6, span);
    float* const zeros = scratch[kInputs + kOutputs];  // a vector starts as zeros
    float* const normed = scratch[kInputs + kOutputs + 1];
    float* const dmu = scratch[kInputs + kOutputs + 2];
    float* const dgamma = scratch[kInputs + kOutputs + 3];
    float* const before = scratch[kInputs + kOutputs + 4];
    float* const earlier = scratch[kInputs + kOutputs + 5];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* dweight = needs_norm ? norm_sums.data() + chunk * 2 * width : nullptr;
      for (int64_t index = chunk * spans / chunks; index < (chunk + 1) * spans / chunks; ++index) {
        const int64_t first = index * span, count = std::min(span, total - first);
        const float* in[kInputs];
        for (int i = 0; i < kInputs; ++i) {
          in[i] = from[i] ? read(from[i], first, count, scratch[i]) : nullptr;
        }
        if (correction) in[kF] = correction->clipped(scratch[kF], in[kF], index, earlier);
        float* out[kOutputs];
        for (int i = 0; i < kOutputs; ++i) {
          float* spare = scratch[kInputs + i];
          out[i] = to[i] ? place(to[i], first, spare) : spare;
        }
        const float* upstream = in[kDy] ? in[kDy] : zeros;
        if (norm_eps) {
          const Forward a{in[kX], in[kF], in[kS0], in[kS1], in[kS2], normed, nullptr, nullptr, nullptr};
          rule.output(a, count, c, from_state);
          const float inverse = normalise(normed, count, static_cast<float>(*norm_eps));
          normalise_backward(
              before, upstream, normed, inverse, scale, dweight, dweight ? dweight + width : nullptr, count);
          upstream = before;
        }
        if (to[kDx]) scale_into(out[kDx], upstream, c.keep, count);
        const Backward b{upstream,
                         in[kF],
                         in[kS0],
                         in[kS1],
                         in[kS2],
                         in[kG0] ? in[kG0] : zeros,
                         in[kG1] ? in[kG1] : zeros,
                         in[kG2] ? in[kG2] : zeros,
                         out[kDf],
                         out[kD0],
                         out[kD1],
                         out[kD2],
                         needs_numbers ? dmu : nullptr,
                         needs_numbers ? dgamma : nullptr};
        rule.backward(b, count, c, from_state);
        if (needs_numbers) {
          add_sum(&number_sums[2 * chunk], dmu, count);
          add_sum(&number_sums[2 * chunk + 1], dgamma, count);
        }
        if (dropping.on && to[kDf]) drop(dropping, out[kDf], first, count);
        if (corrects) products[index] = dot(out[kDf], in[kF], count);
        for (int i = 0; i < kOutputs; ++i) {
          if (to[i]) write(to[i], first, count, out[i]);
        }
      }
    }
  });
  if (corrects) {
    const Tensor& g = pushed ? *pushed : gradients[kDf];
    correction->backward(g.const_data_ptr<float>(), products, target_of(gradients[kDf]));
  }
  Tensor dnorm = needs_norm ? torch::stable::new_zeros(like, {2, width}, ScalarType::Float)
                            : new_result(like, {0}, ScalarType::Float);
  Tensor dnumbers = needs_numbers ? torch::stable::new_zeros(like, {2}, ScalarType::Float)
                                  : new_result(like, {0}, ScalarType::Float);
  double mu_sum = 0.0, gamma_sum = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    if (needs_norm)
      add_scaled(dnorm.mutable_data_ptr<float>(), norm_sums.data() + chunk * 2 * width, 1.0f, 2 * width);
    mu_sum += number_sums[2 * chunk];
    gamma_sum += number_sums[2 * chunk + 1];
  }
  if (needs_numbers) {
    dnumbers.mutable_data_ptr<float>()[0] = static_cast<float>(mu_sum);
    dnumbers.mutable_data_ptr<float>()[1] = static_cast<float>(gamma_sum);
  }
  return {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], dnorm, dnumbers};
}

}  // namespace

}  // namespace molex::momentum

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("momentum_bwd", molex::cpu_kernel<&molex::momentum::momentum_bwd>);
}
