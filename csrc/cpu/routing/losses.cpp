// A router's auxiliary losses on a CPU: softmax statistics in one pass over the logits, forward and backward.
//
// Tokens are cut into chunks of a fixed size, whose sums are added in order: the result does not depend on
// the number of threads.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/indices.h"
#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "cpu/common/softmax.h"
#include "registration.h"

namespace {

using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;   // tokens
constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

// Calls body(first token, last token, chunk) for each chunk, shared among the threads.
template <class Body>
void for_chunks(int64_t tokens, int64_t experts, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (kChunk * experts));
  torch::stable::parallel_for(0, chunks_of(tokens), grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      body(chunk * kChunk, std::min((chunk + 1) * kChunk, tokens), chunk);
    }
  });
}

// Which tokens count: all of them where no mask is given. Holds the tensor that it points into.
class Counted {
 public:
  explicit Counted(const std::optional<Tensor>& mask) : mask_(molex::packed(mask)) {
    if (mask_) counts_ = mask_->const_data_ptr<bool>();
  }

  // Of the tokens from `first` on; null where all count.
  const bool* from(int64_t first) const { return counts_ ? counts_ + first : nullptr; }

  // How many of the tokens count, at least 1.
  int64_t number(int64_t tokens) const {
    const int64_t number = counts_ ? std::count(counts_, counts_ + tokens, true) : tokens;
    return std::max<int64_t>(number, 1);
  }

 private:
  std::optional<Tensor> mask_;
  const bool* counts_ = nullptr;
};

// 1 / temperature within the normal numbers: 0 and infinity would make NaN of infinite logits and of 0.
float scale_at(double temperature) {
  using Limits = std::numeric_limits<float>;
  return static_cast<float>(std::clamp<double>(1.0 / temperature, Limits::min(), Limits::max()));
}

// sums += softmax(scale z_t) over those of `count` tokens that count. `sums` and `row` have whole vectors.
constexpr auto add_probabilities = molex::versions([](auto,
                                                      const float* z,
                                                      const bool* counted,
                                                      float scale,
                                                      int64_t count,
                                                      int64_t experts,
                                                      float* row,
                                                      float* sums) MOLEX_LAMBDA_INLINE {
  for (int64_t t = 0; t < count; ++t) {
    if (counted && !counted[t]) continue;
    const float inverse = 1.0f / molex::exponentials_of(z + t * experts, scale, row, experts).sum;
    for (int64_t e = 0; e < experts; e += molex::kWide) {
      molex::store(sums + e, molex::load(sums + e) + inverse * molex::load(row + e));
    }
  }
});

// dz = factor * row. `row` has whole vectors, dz only `experts` floats.
MOLEX_INLINE void scale_row(const float* row, float factor, int64_t experts, float* dz) {
  int64_t e = 0;
  for (; e + molex::kWide <= experts; e += molex::kWide) {
    molex::store(dz + e, factor * molex::load(row + e));
  }
  for (; e < experts; ++e) dz[e] = factor * row[e];
}

// dz_t = grad p_t (slopes - <slopes, p_t>), p_t = softmax(scale z_t); 0 for a token that does not count.
constexpr auto balance_backward = molex::versions([](auto,
                                                     const float* z,
                                                     const bool* counted,
                                                     float scale,
                                                     float grad,
                                                     const float* slopes,
                                                     int64_t count,
                                                     int64_t experts,
                                                     float* row,
                                                     float* dz) MOLEX_LAMBDA_INLINE {
  for (int64_t t = 0; t < count; ++t) {
    if (counted && !counted[t]) {
      std::fill_n(dz + t * experts, experts, 0.0f);
      continue;
    }
    const float inverse = 1.0f / molex::exponentials_of(z + t * experts, scale, row, experts).sum;
    molex::Wide dot = {};
    for (int64_t e = 0; e < experts; e += molex::kWide) dot += molex::load(row + e) * molex::load(slopes + e);
    const float mean = inverse * molex::sum_of_lanes(dot);
    for (int64_t e = 0; e < experts; e += molex::kWide) {
      molex::store(row + e, molex::load(row + e) * (molex::load(slopes + e) - mean));
    }
    scale_row(row, grad * inverse, experts, dz + t * experts);
  }
});

// values_t = logsumexp(z_t) and sums_t = sum_e e^(z_te - m_t); 0 and 1 for a token that does not count. If dz
// is given, the terms of that sum are written to it.
MOLEX_INLINE void logsumexp_of(const float* z,
                               const bool* counted,
                               int64_t count,
                               int64_t experts,
                               float* row,
                               float* values,
                               float* sums,
                               float* dz) {
  for (int64_t t = 0; t < count; ++t, z += experts) {
    if (counted && !counted[t]) {
      values[t] = 0.0f;
      sums[t] = 1.0f;
      continue;
    }
    const auto [largest, sum] = molex::exponentials_of(z, 1.0f, row, experts);
    values[t] = largest;
    sums[t] = sum;
    if (dz) scale_row(row, 1.0f, experts, dz + t * experts);
  }
  for (int64_t t = 0; t < count; ++t) values[t] += molex::log_of(sums[t]);
}

// sum_t logsumexp(z_t)^2 over the tokens that count.
constexpr auto sum_of_squares =
    molex::versions([](auto, const float* z, const bool* counted, int64_t count, int64_t experts, float* row)
                        MOLEX_LAMBDA_INLINE {
                          float values[kChunk], sums[kChunk];
                          logsumexp_of(z, counted, count, experts, row, values, sums, nullptr);
                          double total = 0.0;
                          for (int64_t t = 0; t < count; ++t)
                            total += static_cast<double>(values[t]) * values[t];
                          return total;
                        });

// dz_t = grad logsumexp(z_t) softmax(z_t); 0 for a token that does not count.
constexpr auto z_backward = molex::versions([](auto,
                                               const float* z,
                                               const bool* counted,
                                               float grad,
                                               int64_t count,
                                               int64_t experts,
                                               float* row,
                                               float* dz) MOLEX_LAMBDA_INLINE {
  float values[kChunk], sums[kChunk];
  logsumexp_of(z, counted, count, experts, row, values, sums, dz);
  for (int64_t t = 0; t < count; ++t) values[t] *= grad / sums[t];
  for (int64_t t = 0; t < count; ++t) {
    if (counted && !counted[t]) {
      std::fill_n(dz + t * experts, experts, 0.0f);
    } else {
      scale_row(dz + t * experts, values[t], experts, dz + t * experts);
    }
  }
});

Tensor scalar_like(const Tensor& like, double value) {
  Tensor result = molex::new_result(like, {}, ScalarType::Float);
  *result.mutable_data_ptr<float>() = static_cast<float>(value);
  return result;
}

// The gradient of the logits, chunk by chunk: run(z, first, count, row, dz), where `first` is a token.
template <class Run>
Tensor logits_gradient(const Tensor& logits, const Run& run) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Tensor packed = torch::stable::contiguous(logits);
  const Source from = molex::source_of(packed);
  Tensor result = molex::new_result(logits, {tokens, experts});
  const Target to = molex::target_of(result);
  if (experts == 0) return result;
  for_chunks(tokens, experts, [&](int64_t first, int64_t last, int64_t) {
    const int64_t count = last - first, size = count * experts;
    const bool is_fp32 = from.dtype == ScalarType::Float;
    std::vector<float> row(molex::wide_of(experts)), in(is_fp32 ? 0 : size), out(is_fp32 ? 0 : size);
    float* dz = molex::place(to, first * experts, out.data());
    run(molex::read(from, first * experts, size, in.data()), first, count, row.data(), dz);
    molex::write(to, first * experts, size, dz);
  });
  return result;
}

// The loss, and slopes [E], its gradient with respect to sum_t p_t with the softmax's scale: E f_e / (T
// temperature), divided by K as well if each assignment counts. T is the number of tokens that count.
std::tuple<Tensor, Tensor> load_balance_fwd(const Tensor& logits,
                                            const Tensor& index,
                                            std::optional<Tensor> mask,
                                            double temperature,
                                            bool per_assignment) {
  const int64_t tokens = logits.size(0), experts = logits.size(1), whole = molex::wide_of(experts);
  const Counted counted(mask);
  const int64_t number = counted.number(tokens), top_k = index.size(1);
  const int64_t assignments = std::max<int64_t>(number * top_k, 1);
  const double parts = static_cast<double>(per_assignment ? assignments : number);
  Tensor slopes = torch::stable::new_zeros(logits, {whole}, ScalarType::Float);
  if (experts == 0) return {scalar_like(logits, 0.0), slopes};
  std::vector<int64_t> counts(experts + 1, 0);
  const std::vector<int64_t> labels = molex::labels_of(index, experts);
  const bool* counts_here = counted.from(0);
  for (int64_t t = 0; t < tokens; ++t) {
    if (counts_here && !counts_here[t]) continue;
    for (int64_t k = 0; k < top_k; ++k) ++counts[labels[t * top_k + k]];
  }
  const Tensor packed = torch::stable::contiguous(logits);
  const Source from = molex::source_of(packed);
  std::vector<float> sums(chunks_of(tokens) * whole, 0.0f);
  for_chunks(tokens, experts, [&](int64_t first, int64_t last, int64_t chunk) {
    const int64_t size = (last - first) * experts;
    std::vector<float> row(whole), scratch(from.dtype == ScalarType::Float ? 0 : size);
    const float* z = molex::read(from, first * experts, size, scratch.data());
    const float scale = scale_at(temperature);
    add_probabilities(z, counted.from(first), scale, last - first, experts, row.data(), &sums[chunk * whole]);
  });
  float* slope = slopes.mutable_data_ptr<float>();
  double loss = 0.0;
  for (int64_t e = 0; e < experts; ++e) {
    double probability = 0.0;
    for (int64_t chunk = 0; chunk < chunks_of(tokens); ++chunk) probability += sums[chunk * whole + e];
    const double weight = static_cast<double>(experts) * counts[e] / assignments / parts;
    loss += weight * probability;
    slope[e] = static_cast<float>(weight / temperature);
  }
  return {scalar_like(logits, loss), slopes};
}

Tensor load_balance_bwd(const Tensor& grad,
                        const Tensor& logits,
                        const Tensor& slopes,
                        std::optional<Tensor> mask,
                        double temperature) {
  const float upstream = molex::scalar_of(grad), scale = scale_at(temperature);
  const float* slope = slopes.const_data_ptr<float>();
  const Counted counted(mask);
  return logits_gradient(logits, [&](const float* z, int64_t first, int64_t count, float* row, float* dz) {
    balance_backward(z, counted.from(first), scale, upstream, slope, count, logits.size(1), row, dz);
  });
}

Tensor router_z_fwd(const Tensor& logits, std::optional<Tensor> mask) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Tensor packed = torch::stable::contiguous(logits);
  const Source from = molex::source_of(packed);
  const Counted counted(mask);
  std::vector<double> sums(chunks_of(tokens), 0.0);
  for_chunks(tokens, std::max<int64_t>(experts, 1), [&](int64_t first, int64_t last, int64_t chunk) {
    const int64_t size = (last - first) * experts;
    std::vector<float> row(molex::wide_of(experts)), scratch(from.dtype == ScalarType::Float ? 0 : size);
    const float* z = molex::read(from, first * experts, size, scratch.data());
    sums[chunk] = sum_of_squares(z, counted.from(first), last - first, experts, row.data());
  });
  double total = 0.0;
  for (double sum : sums) total += sum;
  return scalar_like(logits, total / static_cast<double>(counted.number(tokens)));
}

Tensor router_z_bwd(const Tensor& grad, const Tensor& logits, std::optional<Tensor> mask) {
  const Counted counted(mask);
  const double number = static_cast<double>(counted.number(logits.size(0)));
  const float upstream = static_cast<float>(2.0 * molex::scalar_of(grad) / number);
  return logits_gradient(logits, [&](const float* z, int64_t first, int64_t count, float* row, float* dz) {
    z_backward(z, counted.from(first), upstream, count, logits.size(1), row, dz);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("load_balance_fwd", molex::cpu_kernel<&load_balance_fwd>);
  library.impl("load_balance_bwd", molex::cpu_kernel<&load_balance_bwd>);
  library.impl("router_z_fwd", molex::cpu_kernel<&router_z_fwd>);
  library.impl("router_z_bwd", molex::cpu_kernel<&router_z_bwd>);
}
