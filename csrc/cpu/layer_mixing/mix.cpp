// The mixture of branches with its residual and LayerNorm, token by token. Branches are read, and results
// rounded, in the registers of the pass that computes: between two passes over a token there is at most one
// row of floats, in the first cache.
//
// Sums over tokens go to a fixed number of chunks, which are added in order: the result does not depend on
// the number of threads.

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/common/elements.h"
#include "cpu/common/memory.h"
#include "registration.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunks = 64;   // partial sums of the gradients of the coefficients and the norm
constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

// A tensor [G, T, D] whose branches may be anywhere in memory, also expanded.
class Branches {
 public:
  Branches(const std::optional<Tensor>& tensor, ScalarType dtype) {
    if (!tensor) return;
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, "residual: expected the dtype of outputs");
    const bool packed = tensor->stride(2) == 1 && tensor->stride(1) == tensor->size(2);
    kept_ = packed ? *tensor : torch::stable::contiguous(*tensor);
    stride_ = kept_->stride(0);
  }

  // Null if there is no tensor.
  template <class Element>
  const Element* data() const {
    return kept_ ? static_cast<const Element*>(kept_->const_data_ptr()) : nullptr;
  }
  int64_t stride() const { return stride_; }

 private:
  std::optional<Tensor> kept_;
  int64_t stride_ = 0;
};

// What is mixed: `outputs` and `residual`, which may be null, are those of a token in the first branch.
template <class Element>
struct Mixture {
  const Element* outputs;
  const Element* residual;
  int64_t stride, residual_stride;
  const float* coeff;
  int64_t branches;

  Mixture at(int64_t element) const {
    Mixture moved = *this;
    moved.outputs += element;
    if (residual) moved.residual += element;
    return moved;
  }
};

// outputs_g + residual_g from element i on.
template <int LANES, bool HAS_RESIDUAL, class Registers, class Element>
MOLEX_INLINE molex::Lanes<LANES> branch_at(Registers registers,
                                           const Mixture<Element>& from,
                                           int64_t g,
                                           int64_t i) {
  molex::Lanes<LANES> x = molex::load_elements<LANES>(registers, from.outputs + g * from.stride + i);
  if constexpr (HAS_RESIDUAL) {
    x += molex::load_elements<LANES>(registers, from.residual + g * from.residual_stride + i);
  }
  return x;
}

template <int LANES, bool HAS_RESIDUAL, class Registers, class Element>
MOLEX_INLINE molex::Lanes<LANES> mixed_at(Registers registers, const Mixture<Element>& from, int64_t i) {
  molex::Lanes<LANES> sum = {};
  for (int64_t g = 0; g < from.branches; ++g) {
    sum += from.coeff[g] * branch_at<LANES, HAS_RESIDUAL>(registers, from, g, i);
  }
  return sum;
}

// Mixes a token into a row of floats and, where there is a `y`, into that; returns the sum of the row.
template <bool HAS_RESIDUAL, class Registers, class Element>
MOLEX_INLINE float mix_into(
    Registers registers, const Mixture<Element>& from, float* row, Element* y, int64_t count) {
  constexpr int kLanes = molex::lanes_of<Element>(Registers{});
  return molex::sum_terms<kLanes>(
      count,
      [&](int64_t i) MOLEX_LAMBDA_INLINE {
        const auto x = mixed_at<kLanes, HAS_RESIDUAL>(registers, from, i);
        molex::store(row + i, x);
        if (!std::is_same_v<Element, float> && y) molex::store_elements<kLanes>(registers, y + i, x);
        return x;
      },
      [&](int64_t i) MOLEX_LAMBDA_INLINE {
        const float x = mixed_at<1, HAS_RESIDUAL>(registers, from, i);
        row[i] = x;
        if (!std::is_same_v<Element, float> && y) y[i] = static_cast<Element>(x);
        return x;
      });
}

// 1 / sqrt(variance + eps) of a row with this mean.
template <int LANES>
MOLEX_INLINE float inverse_deviation(const float* row, float mean, float eps, int64_t count) {
  const float squares = molex::sum_terms<LANES>(
      count,
      [=](int64_t i) MOLEX_LAMBDA_INLINE {
        const molex::Floats<LANES> x = molex::load<LANES>(row + i) - mean;
        return x * x;
      },
      [=](int64_t i) MOLEX_LAMBDA_INLINE { return (row[i] - mean) * (row[i] - mean); });
  return 1.0f / std::sqrt(squares / count + eps);
}

// LayerNorm's parameters, or ones and zeros.
struct Norm {
  const float* scale;
  const float* shift;
  float eps;
};

// y and, unless `normed` is null, LayerNorm(y) of a token. `row` is scratch, or y itself in fp32.
template <class Element, bool HAS_RESIDUAL>
constexpr auto mix_token = molex::versions([](auto registers,
                                              Mixture<Element> from,
                                              float* row,
                                              Element* y,
                                              Element* normed,
                                              Norm norm,
                                              int64_t count) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = molex::lanes_of<Element>(decltype(registers){});
  const float mean = mix_into<HAS_RESIDUAL>(registers, from, row, y, count) / count;
  if (!normed) return;
  const float inverse = inverse_deviation<kLanes>(row, mean, norm.eps, count);
  molex::for_elements<kLanes>(count, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
    constexpr int kCount = lanes;
    const auto x = (molex::load_elements<kCount>(registers, row + i) - mean) * inverse;
    const auto moved = x * molex::load_elements<kCount>(registers, norm.scale + i) +
                       molex::load_elements<kCount>(registers, norm.shift + i);
    molex::store_elements<kCount>(registers, normed + i, moved);
  });
});

// Where the gradients of a token go; those not needed are null.
template <class Element>
struct Gradients {
  Element* outputs;  // of the first branch
  int64_t stride;
  double* coeff;
  float* scale;  // with `shift` or not at all
  float* shift;
};

// Writes the gradient of y into the row: `dy` and what comes through the norm, of which one may be null.
template <bool HAS_RESIDUAL, class Registers, class Element>
MOLEX_INLINE void upstream_into(Registers registers,
                                const Mixture<Element>& from,
                                const Element* dy,
                                const Element* dnormed,
                                float* row,
                                const Gradients<Element>& to,
                                const Norm& norm,
                                int64_t count) {
  constexpr int kLanes = molex::lanes_of<Element>(Registers{});
  if (!dnormed) {
    molex::for_elements<kLanes>(count, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
      constexpr int kCount = lanes;
      molex::store_elements<kCount>(registers, row + i, molex::load_elements<kCount>(registers, dy + i));
    });
    return;
  }
  const float middle =
      mix_into<HAS_RESIDUAL>(registers, from, row, static_cast<Element*>(nullptr), count) / count;
  const float inverse = inverse_deviation<kLanes>(row, middle, norm.eps, count);
  // The gradient of the normalised row before its scale.
  const auto outer = [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
    constexpr int kCount = lanes;
    return molex::load_elements<kCount>(registers, dnormed + i) *
           molex::load_elements<kCount>(registers, norm.scale + i);
  };
  const auto project = [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
    constexpr int kCount = lanes;
    const molex::Lanes<kCount> normed = (molex::load_elements<kCount>(registers, row + i) - middle) * inverse;
    molex::store_elements<kCount>(registers, row + i, normed);
    if (to.scale) {
      const molex::Lanes<kCount> given = molex::load_elements<kCount>(registers, dnormed + i);
      molex::store_elements<kCount>(
          registers, to.scale + i, molex::load_elements<kCount>(registers, to.scale + i) + given * normed);
      molex::store_elements<kCount>(
          registers, to.shift + i, molex::load_elements<kCount>(registers, to.shift + i) + given);
    }
    return outer(lanes, i) * normed;
  };
  const auto sum = [&](const auto& term) MOLEX_LAMBDA_INLINE {
    return molex::sum_terms<kLanes>(
        count,
        [&](int64_t i) MOLEX_LAMBDA_INLINE { return term(std::integral_constant<int, kLanes>{}, i); },
        [&](int64_t i) MOLEX_LAMBDA_INLINE { return term(std::integral_constant<int, 1>{}, i); });
  };
  const float projection = sum(project) / count;
  const float mean = sum(outer) / count;
  molex::for_elements<kLanes>(count, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
    constexpr int kCount = lanes;
    const molex::Lanes<kCount> normed = molex::load_elements<kCount>(registers, row + i);
    molex::Lanes<kCount> gradient = inverse * (outer(lanes, i) - normed * projection - mean);
    if (dy) gradient += molex::load_elements<kCount>(registers, dy + i);
    molex::store_elements<kCount>(registers, row + i, gradient);
  });
}

// The gradients of a token; `row` is scratch.
template <class Element, bool HAS_RESIDUAL>
constexpr auto mix_token_backward = molex::versions([](auto registers,
                                                       Mixture<Element> from,
                                                       const Element* dy,
                                                       const Element* dnormed,
                                                       float* row,
                                                       Gradients<Element> to,
                                                       Norm norm,
                                                       int64_t count) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = molex::lanes_of<Element>(decltype(registers){});
  upstream_into<HAS_RESIDUAL>(registers, from, dy, dnormed, row, to, norm, count);
  for (int64_t g = 0; g < from.branches; ++g) {
    Element* mine = to.outputs ? to.outputs + g * to.stride : nullptr;
    const float coeff = from.coeff[g];
    const auto write = [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
      constexpr int kCount = lanes;
      const molex::Lanes<kCount> gradient = molex::load_elements<kCount>(registers, row + i);
      if (mine) molex::store_elements<kCount>(registers, mine + i, coeff * gradient);
      return gradient;
    };
    if (!to.coeff) {
      molex::for_elements<kLanes>(count, write);
      continue;
    }
    to.coeff[g] += molex::sum_terms<kLanes>(
        count,
        [&](int64_t i) MOLEX_LAMBDA_INLINE {
          return write(std::integral_constant<int, kLanes>{}, i) *
                 branch_at<kLanes, HAS_RESIDUAL>(registers, from, g, i);
        },
        [&](int64_t i) MOLEX_LAMBDA_INLINE {
          return write(std::integral_constant<int, 1>{}, i) *
                 branch_at<1, HAS_RESIDUAL>(registers, from, g, i);
        });
  }
});

// Calls the function with a value of the element type and whether there is a residual.
template <class Function>
void by_kind(ScalarType dtype, bool has_residual, const Function& function) {
  molex::by_dtype(dtype, [&](auto element) {
    has_residual ? function(element, std::true_type{}) : function(element, std::false_type{});
  });
}

// The parameters of a norm as floats, with ones and zeros for what is not there.
class Parameters {
 public:
  Parameters(const std::optional<Tensor>& weight,
             const std::optional<Tensor>& bias,
             std::optional<double> eps,
             int64_t width)
      : eps_(static_cast<float>(eps.value_or(0.0))) {
    if (!eps) return;
    scale_ = weight ? molex::floats_of(*weight) : std::vector<float>(width, 1.0f);
    shift_ = bias ? molex::floats_of(*bias) : std::vector<float>(width, 0.0f);
  }
  Norm norm() const { return {scale_.data(), shift_.data(), eps_}; }

 private:
  std::vector<float> scale_, shift_;
  float eps_;
};

template <class Element>
const Element* elements_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const Element*>(tensor->const_data_ptr()) : nullptr;
}

template <class Element>
Element* elements_at(Element* data, int64_t first) {
  return data ? data + first : nullptr;
}

template <class Element>
Mixture<Element> mixture_of(const Branches& outputs,
                            const Branches& residual,
                            const std::vector<float>& coeff) {
  return {outputs.data<Element>(),
          residual.data<Element>(),
          outputs.stride(),
          residual.stride(),
          coeff.data(),
          static_cast<int64_t>(coeff.size())};
}

std::tuple<Tensor, Tensor> layer_mix_fwd(const Tensor& outputs,
                                         const Tensor& coeff,
                                         std::optional<Tensor> residual,
                                         std::optional<Tensor> weight,
                                         std::optional<Tensor> bias,
                                         std::optional<double> eps) {
  const ScalarType dtype = outputs.scalar_type();
  const int64_t tokens = outputs.size(1), width = outputs.size(2);
  Tensor y = molex::new_result(outputs, {tokens, width});
  Tensor normed = eps ? molex::new_result(outputs, {tokens, width}) : torch::stable::new_empty(outputs, {0});
  const Branches from(outputs, dtype), moved(residual, dtype);
  const std::vector<float> coefficients = molex::floats_of(coeff);
  const Parameters parameters(weight, bias, eps, width);
  if (tokens * width == 0) return {y, normed};
  by_kind(dtype, residual.has_value(), [&](auto element, auto has_residual) {
    using Element = decltype(element);
    constexpr bool kInPlace = std::is_same_v<Element, float>;  // the row is y itself
    const auto mixture = mixture_of<Element>(from, moved, coefficients);
    auto* to = static_cast<Element*>(y.mutable_data_ptr());
    auto* to_normed = eps ? static_cast<Element*>(normed.mutable_data_ptr()) : nullptr;
    torch::stable::parallel_for(
        0, tokens, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
          molex::Scratch scratch(1, kInPlace ? 0 : width);
          for (int64_t t = begin; t < end; ++t) {
            float* row = scratch[0];
            if constexpr (kInPlace) row = to + t * width;
            mix_token<Element, has_residual>(mixture.at(t * width),
                                             row,
                                             to + t * width,
                                             elements_at(to_normed, t * width),
                                             parameters.norm(),
                                             width);
          }
        });
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
  const ScalarType dtype = outputs.scalar_type();
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
  const std::optional<Tensor> direct = molex::packed(dy);
  const std::optional<Tensor> through = eps ? molex::packed(dnormed) : std::nullopt;
  for (const std::optional<Tensor>& given : {direct, through}) {
    STD_TORCH_CHECK(!given || given->scalar_type() == dtype, "dy: expected the dtype of outputs");
  }
  const Branches from(outputs, dtype), moved(residual, dtype);
  const std::vector<float> coefficients = molex::floats_of(coeff);
  const Parameters parameters(weight, std::nullopt, eps, width);

  const int64_t chunks = std::min(kChunks, tokens);
  std::vector<float> norm_sums(needs_norm ? chunks * 2 * width : 0);
  std::vector<double> coeff_sums(needs_coeff ? chunks * branches : 0);
  const int64_t grain = std::max<int64_t>(1, kGrain * chunks / (tokens * width));
  by_kind(dtype, residual.has_value(), [&](auto element, auto has_residual) {
    using Element = decltype(element);
    const auto mixture = mixture_of<Element>(from, moved, coefficients);
    const Element* dy = elements_of<Element>(direct);
    const Element* dnormed = elements_of<Element>(through);
    auto* to = needs_outputs ? static_cast<Element*>(doutputs.mutable_data_ptr()) : nullptr;
    const std::vector<Element> zeros(dy || dnormed ? 0 : width, Element(0.0f));
    torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
      molex::Scratch scratch(1, width);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        float* sums = needs_norm ? &norm_sums[chunk * 2 * width] : nullptr;
        double* of_coeff = needs_coeff ? &coeff_sums[chunk * branches] : nullptr;
        for (int64_t t = chunk * tokens / chunks; t < (chunk + 1) * tokens / chunks; ++t) {
          const int64_t first = t * width;
          mix_token_backward<Element, has_residual>(
              mixture.at(first),
              dy || dnormed ? elements_at(dy, first) : zeros.data(),
              elements_at(dnormed, first),
              scratch[0],
              Gradients<Element>{
                  elements_at(to, first), tokens * width, of_coeff, sums, elements_at(sums, width)},
              parameters.norm(),
              width);
        }
      }
    });
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
