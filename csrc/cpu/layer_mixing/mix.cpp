// The mixture of branches with its residual and LayerNorm, token by token in one pass each way.
//
// Sums over tokens go to a fixed number of chunks, which are added in order: the result does not depend on
// the number of threads.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/layer_norm.h"
#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "registration.h"

namespace {

using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunks = 64;   // partial sums of the gradients of the coefficients and the norm
constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

// A tensor [G, T, D] whose branches may be anywhere in memory, also expanded.
class Branches {
 public:
  explicit Branches(const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    const bool packed = tensor->stride(2) == 1 && tensor->stride(1) == tensor->size(2);
    kept_ = packed ? *tensor : torch::stable::contiguous(*tensor);
    source_ = molex::source_of(kept_);
    width_ = kept_->size(2);
    stride_ = kept_->stride(0);
  }

  explicit operator bool() const { return kept_.has_value(); }

  const float* read(int64_t branch, int64_t token, float* scratch) const {
    return molex::read(source_, branch * stride_ + token * width_, width_, scratch);
  }

 private:
  std::optional<Tensor> kept_;
  Source source_;
  int64_t width_ = 0, stride_ = 0;
};

constexpr auto add_branch = molex::versions(
    [](auto, float* sum, const float* output, const float* residual, float coeff, bool first, int64_t count)
        MOLEX_LAMBDA_INLINE {
          if (residual) {
            MOLEX_INDEPENDENT
            for (int64_t i = 0; i < count; ++i) {
              sum[i] = (first ? 0.0f : sum[i]) + coeff * (output[i] + residual[i]);
            }
          } else {
            MOLEX_INDEPENDENT
            for (int64_t i = 0; i < count; ++i) sum[i] = (first ? 0.0f : sum[i]) + coeff * output[i];
          }
        });

// sum_g coeff_g (outputs_g + residual_g) of one token; two rows of scratch.
void mix(const Branches& outputs,
         const Branches& residual,
         const std::vector<float>& coeff,
         int64_t token,
         int64_t width,
         float* sum,
         molex::Scratch& scratch) {
  for (size_t g = 0; g < coeff.size(); ++g) {
    const float* output = outputs.read(g, token, scratch[0]);
    const float* moved = residual ? residual.read(g, token, scratch[1]) : nullptr;
    add_branch(sum, output, moved, coeff[g], g == 0, width);
  }
}

// Null if there are no values.
const float* data_of(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

std::tuple<Tensor, Tensor> layer_mix_fwd(const Tensor& outputs,
                                         const Tensor& coeff,
                                         std::optional<Tensor> residual,
                                         std::optional<Tensor> weight,
                                         std::optional<Tensor> bias,
                                         std::optional<double> eps) {
  const int64_t tokens = outputs.size(1), width = outputs.size(2);
  Tensor y = molex::new_result(outputs, {tokens, width});
  Tensor normed = eps ? molex::new_result(outputs, {tokens, width}) : torch::stable::new_empty(outputs, {0});
  const Target to = molex::target_of(y), to_normed = molex::target_of(normed);
  const Branches from(outputs), moved(residual);
  const std::vector<float> coefficients = molex::floats_of(coeff);
  const std::vector<float> scale = molex::floats_of(weight);
  const std::vector<float> shift = molex::floats_of(bias);
  if (tokens * width == 0) return {y, normed};
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
        molex::Scratch scratch(4, width);
        for (int64_t t = begin; t < end; ++t) {
          float* sum = molex::place(to, t * width, scratch[2]);
          mix(from, moved, coefficients, t, width, sum, scratch);
          molex::write(to, t * width, width, sum);
          if (!eps) continue;
          float* row = molex::place(to_normed, t * width, scratch[3]);
          std::copy_n(sum, width, row);
          molex::normalise(row, width, static_cast<float>(*eps));
          molex::scale_and_shift(row, data_of(scale), data_of(shift), width);
          molex::write(to_normed, t * width, width, row);
        }
      });
  return {y, normed};
}

// Gradients of the outputs (the residual has the same), of the coefficients and of the norm's parameters [2,
// D]. Those not needed are empty.
std::tuple<Tensor, Tensor, Tensor> layer_mix_bwd(std::optional<Tensor> dy,
                                                 std::optional<Tensor> dnormed,
                                                 const Tensor& outputs,
                                                 const Tensor& coeff,
                                                 std::optional<Tensor> residual,
                                                 std::optional<Tensor> weight,
                                                 std::optional<double> eps,
                                                 std::vector<bool> needs) {
  const int64_t branches = outputs.size(0), tokens = outputs.size(1), width = outputs.size(2);
  const bool needs_outputs = needs[0], needs_coeff = needs[1], needs_norm = needs[2];
  const auto gradient = [&](bool need, std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_zeros(outputs, need ? sizes : std::vector<int64_t>{0}, dtype);
  };
  Tensor doutputs = molex::new_result(
      outputs, needs_outputs ? std::vector<int64_t>{branches, tokens, width} : std::vector<int64_t>{0});
  Tensor dcoeff = gradient(needs_coeff, {branches}, ScalarType::Float);
  Tensor dnorm = gradient(needs_norm, {2, width}, ScalarType::Float);
  if (tokens * width == 0) return {doutputs, dcoeff, dnorm};
  const std::optional<Tensor> packed[] = {molex::packed(dy), molex::packed(dnormed)};
  const Source direct = molex::source_of(packed[0]), through = molex::source_of(packed[1]);
  const Target to = molex::target_of(doutputs);
  const Branches from(outputs), moved(residual);
  const std::vector<float> coefficients = molex::floats_of(coeff);
  const std::vector<float> scale = molex::floats_of(weight);

  const int64_t chunks = std::min(kChunks, tokens);
  std::vector<float> norm_sums(needs_norm ? chunks * 2 * width : 0);
  std::vector<double> coeff_sums(needs_coeff ? chunks * branches : 0);
  const int64_t grain = std::max<int64_t>(1, kGrain * chunks / (tokens * width));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    molex::Scratch scratch(8, width);
    float *mixed = scratch[2], *before = scratch[3], *upstream = scratch[4];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* sums = needs_norm ? &norm_sums[chunk * 2 * width] : nullptr;
      for (int64_t t = chunk * tokens / chunks; t < (chunk + 1) * tokens / chunks; ++t) {
        const float* gradient = direct ? molex::read(direct, t * width, width, scratch[5]) : nullptr;
        if (through && eps) {
          const float* outer = molex::read(through, t * width, width, scratch[6]);
          mix(from, moved, coefficients, t, width, mixed, scratch);
          const float inverse = molex::normalise(mixed, width, static_cast<float>(*eps));
          molex::normalise_backward(
              before, outer, mixed, inverse, data_of(scale), sums, sums ? sums + width : nullptr, width);
          if (gradient) molex::add(before, gradient, width);
          gradient = before;
        }
        if (!gradient) {
          std::fill_n(upstream, width, 0.0f);
          gradient = upstream;
        }
        for (int64_t g = 0; g < branches; ++g) {
          if (needs_outputs) {
            const int64_t at = (g * tokens + t) * width;
            float* row = molex::place(to, at, scratch[7]);
            molex::scale_into(row, gradient, coefficients[g], width);
            molex::write(to, at, width, row);
          }
          if (needs_coeff) {
            double sum = molex::dot(gradient, from.read(g, t, scratch[0]), width);
            if (moved) sum += molex::dot(gradient, moved.read(g, t, scratch[1]), width);
            coeff_sums[chunk * branches + g] += sum;
          }
        }
      }
    }
  });
  for (int64_t i = 0; needs_norm && i < 2 * width; ++i) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += norm_sums[chunk * 2 * width + i];
    dnorm.mutable_data_ptr<float>()[i] = static_cast<float>(sum);
  }
  for (int64_t g = 0; needs_coeff && g < branches; ++g) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += coeff_sums[chunk * branches + g];
    dcoeff.mutable_data_ptr<float>()[g] = static_cast<float>(sum);
  }
  return {doutputs, dcoeff, dnorm};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("layer_mix_fwd", molex::cpu_kernel<&layer_mix_fwd>);
  library.impl("layer_mix_bwd", molex::cpu_kernel<&layer_mix_bwd>);
}
