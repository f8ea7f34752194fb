// A router's auxiliary losses on a CPU: softmax statistics in one pass over the logits, forward and backward.
//
// Tokens are cut into chunks of a fixed size, whose sums are added in order: the result does not depend on
// the number of threads.

#include <algorithm>
#include <limits>
#include <optional>
#include <unordered_map>
#include <vector>

#include "cpu/common/columns.h"
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

  // How many of the tokens count.
  int64_t number(int64_t tokens) const {
    return counts_ ? std::count(counts_, counts_ + tokens, true) : tokens;
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

// What a probability of each expert adds to the loss, by the sequence of its token.
struct Balance {
  Balance(const Tensor& index,
          const Counted& counted,
          const std::optional<Tensor>& sequence,
          const std::optional<Tensor>& totals,
          int64_t experts,
          bool per_assignment,
          int64_t ranks);

  // Of the tokens from `first` on; null if all are of one sequence.
  const int64_t* from(int64_t first) const { return places.empty() ? nullptr : places.data() + first; }

  std::vector<int64_t> places;  // the number of each token's sequence; empty if all are of one
  std::vector<float> slopes;    // [sequences, experts in whole vectors]
};

// Numbers the sequences in the order in which they come; returns how many there are.
int64_t number_sequences(const Tensor& sequence, std::vector<int64_t>& places) {
  const Tensor kept = torch::stable::contiguous(sequence);
  const bool is_long = kept.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || kept.scalar_type() == ScalarType::Int, "sequence: expected int64 or int32");
  std::unordered_map<int64_t, int64_t> numbers;
  places.resize(kept.numel());
  int64_t last = 0;
  for (size_t t = 0; t < places.size(); ++t) {
    const int64_t id = is_long ? kept.const_data_ptr<int64_t>()[t] : kept.const_data_ptr<int32_t>()[t];
    // Tokens of one sequence mostly stand together.
    places[t] = t > 0 && id == last ? places[t - 1] : numbers.try_emplace(id, numbers.size()).first->second;
    last = id;
  }
  return numbers.size();
}

Balance::Balance(const Tensor& index,
                 const Counted& counted,
                 const std::optional<Tensor>& sequence,
                 const std::optional<Tensor>& totals,
                 int64_t experts,
                 bool per_assignment,
                 int64_t ranks) {
  const int64_t tokens = index.size(0), top_k = index.size(1), whole = molex::wide_of(experts);
  const int64_t sequences = sequence ? number_sequences(*sequence, places) : 1;
  std::vector<int64_t> lengths(sequences, 0), counts(sequences * (experts + 1), 0);
  const std::vector<int64_t> labels = molex::labels_of(index, experts);
  const bool* here = counted.from(0);
  for (int64_t t = 0; t < tokens; ++t) {
    if (here && !here[t]) continue;
    const int64_t place = places.empty() ? 0 : places[t];
    ++lengths[place];
    for (int64_t k = 0; k < top_k; ++k) ++counts[place * (experts + 1) + labels[t * top_k + k]];
  }
  int64_t number = sequences - std::count(lengths.begin(), lengths.end(), 0);
  if (totals) {  // of all ranks: the assignments and the tokens, or the number of sequences
    const Tensor kept = torch::stable::contiguous(*totals);
    const int64_t* values = kept.const_data_ptr<int64_t>();
    STD_TORCH_CHECK(kept.numel() == (sequence ? 1 : experts + 1), "totals: expected other sums");
    number = sequence ? values[0] : values[experts];
    if (!sequence) std::copy_n(values, experts, counts.begin());
    if (!sequence) lengths[0] = number;
  }
  if (!sequence) number = 1;
  slopes.assign(std::max<int64_t>(sequences, 1) * whole, 0.0f);
  for (int64_t s = 0; s < sequences; ++s) {
    const double length = static_cast<double>(std::max<int64_t>(lengths[s], 1));
    const double assignments = length * static_cast<double>(std::max<int64_t>(top_k, 1));
    const double parts =
        (per_assignment ? assignments : length) * static_cast<double>(std::max<int64_t>(number, 1));
    for (int64_t e = 0; e < experts; ++e) {
      const double factor = static_cast<double>(ranks) * static_cast<double>(experts);
      slopes[s * whole + e] = static_cast<float>(factor * static_cast<double>(counts[s * (experts + 1) + e]) /
                                                 assignments / parts);
    }
  }
}

// Whether so many tokens are processed kTogether at a time, which pays for a few of them already. Tokens of
// several sequences have no common slopes.
bool is_short(int64_t count, int64_t experts, const void* places = nullptr) {
  return experts <= molex::kShort && count >= 4 && !places;
}

// The scratch floats of a thread: a row in whole vectors, or the columns of kTogether tokens.
int64_t scratch_of(int64_t experts) {
  return experts <= molex::kShort ? experts * molex::kTogether : molex::wide_of(experts);
}

// As sum_of_balance, of tokens of one sequence with few experts, whose `columns` are scratch.
constexpr auto short_sum_of_balance = molex::versions([](auto registers,
                                                         const float* z,
                                                         const bool* counted,
                                                         const float* slopes,
                                                         float scale,
                                                         int64_t count,
                                                         int64_t experts,
                                                         float* columns) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  double totals[molex::kTogether] = {};
  for (int64_t t = 0; t < count; t += molex::kTogether) {
    const int64_t rows = std::min(molex::kTogether, count - t);
    molex::columns_of(z + t * experts, experts, rows, experts, columns);
    float values[molex::kTogether];
    for (int64_t i = 0; i < molex::kTogether; i += kLanes) {
      const auto found = molex::column_exponentials<kLanes>(columns + i, scale, experts);
      molex::store(values + i, molex::column_dot<kLanes>(columns + i, slopes, experts) / found.sum);
    }
    for (int64_t i = 0; i < rows; ++i) totals[i] += counted && !counted[t + i] ? 0.0f : values[i];
  }
  double total = 0.0;
  for (double part : totals) total += part;
  return total;
});

// The sum over `count` tokens that count of <slope, softmax(scale z_t)>, with the slope of the token's place.
// `row` and each slope have `whole` floats, whole vectors.
constexpr auto sum_of_balance = molex::versions([](auto registers,
                                                   const float* z,
                                                   const bool* counted,
                                                   const int64_t* places,
                                                   const float* slopes,
                                                   float scale,
                                                   int64_t count,
                                                   int64_t experts,
                                                   int64_t whole,
                                                   float* row) MOLEX_LAMBDA_INLINE {
  double total = 0.0;
  for (int64_t t = 0; t < count; ++t) {
    if (counted && !counted[t]) continue;
    const float* slope = slopes + (places ? places[t] * whole : 0);
    const float inverse =
        1.0f / molex::exponentials_of<registers.kLanes>(z + t * experts, scale, row, experts).sum;
    total += inverse * molex::dot_of<registers.kLanes>(row, slope, whole);
  }
  return total;
});

// dz = factor * row; dz may be the row.
MOLEX_INLINE void scale_row(const float* row, float factor, int64_t experts, float* dz) {
  MOLEX_INDEPENDENT
  for (int64_t e = 0; e < experts; ++e) dz[e] = factor * row[e];
}

// Sets the gradients of tokens that do not count to 0.
MOLEX_INLINE void clear_others(const bool* counted, int64_t count, int64_t experts, float* dz) {
  for (int64_t t = 0; counted && t < count; ++t) {
    if (!counted[t]) std::fill_n(dz + t * experts, experts, 0.0f);
  }
}

// As balance_backward, of tokens of one sequence with few experts, whose `columns` are scratch.
constexpr auto short_balance_backward = molex::versions([](auto registers,
                                                           const float* z,
                                                           const bool* counted,
                                                           const float* slopes,
                                                           float scale,
                                                           float factor,
                                                           int64_t count,
                                                           int64_t experts,
                                                           float* columns,
                                                           float* dz) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  for (int64_t t = 0; t < count; t += molex::kTogether) {
    const int64_t rows = std::min(molex::kTogether, count - t);
    molex::columns_of(z + t * experts, experts, rows, experts, columns);
    for (int64_t i = 0; i < molex::kTogether; i += kLanes) {
      const auto inverse = 1.0f / molex::column_exponentials<kLanes>(columns + i, scale, experts).sum;
      const auto mean = inverse * molex::column_dot<kLanes>(columns + i, slopes, experts);
      const auto share = factor * inverse;
      for (int64_t e = 0; e < experts; ++e) {
        float* const place = columns + e * molex::kTogether + i;
        molex::store(place, share * (molex::load<kLanes>(place) * (slopes[e] - mean)));
      }
    }
    molex::rows_of(columns, rows, experts, dz + t * experts);
  }
  clear_others(counted, count, experts, dz);
});

// dz_t = factor p_t (slope - <slope, p_t>), p_t = softmax(scale z_t); 0 for a token that does not count.
constexpr auto balance_backward = molex::versions([](auto registers,
                                                     const float* z,
                                                     const bool* counted,
                                                     const int64_t* places,
                                                     const float* slopes,
                                                     float scale,
                                                     float factor,
                                                     int64_t count,
                                                     int64_t experts,
                                                     int64_t whole,
                                                     float* row,
                                                     float* dz) MOLEX_LAMBDA_INLINE {
  for (int64_t t = 0; t < count; ++t) {
    if (counted && !counted[t]) {
      std::fill_n(dz + t * experts, experts, 0.0f);
      continue;
    }
    const float* slope = slopes + (places ? places[t] * whole : 0);
    const float inverse =
        1.0f / molex::exponentials_of<registers.kLanes>(z + t * experts, scale, row, experts).sum;
    const float mean = inverse * molex::dot_of<registers.kLanes>(row, slope, whole);
    MOLEX_INDEPENDENT
    for (int64_t e = 0; e < whole; ++e) row[e] *= slope[e] - mean;
    scale_row(row, factor * inverse, experts, dz + t * experts);
  }
});

// values_t = logsumexp(z_t) and sums_t = sum_e e^(z_te - m_t); 0 and 1 for a token that does not count. If dz
// is given, the terms of that sum are written to it.
template <int LANES>
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
    const auto [largest, sum] = molex::exponentials_of<LANES>(z, 1.0f, row, experts);
    values[t] = largest;
    sums[t] = sum;
    if (dz) scale_row(row, 1.0f, experts, dz + t * experts);
  }
  for (int64_t t = 0; t < count; ++t) values[t] += molex::log_of(sums[t]);
}

// As logsumexp_of, of up to kTogether tokens with few experts: writes m_t and the sums, and leaves the terms
// of the sums in `columns`.
template <int LANES>
MOLEX_INLINE void short_logsumexp_of(
    const float* z, int64_t rows, int64_t experts, float* columns, float* values, float* sums) {
  molex::columns_of(z, experts, rows, experts, columns);
  for (int64_t i = 0; i < molex::kTogether; i += LANES) {
    const auto found = molex::column_exponentials<LANES>(columns + i, 1.0f, experts);
    molex::store(values + i, found.largest);
    molex::store(sums + i, found.sum);
  }
  for (int64_t i = 0; i < molex::kTogether; ++i) values[i] += molex::log_of(sums[i]);
}

// As sum_of_squares, of tokens with few experts, whose `columns` are scratch.
constexpr auto short_sum_of_squares = molex::versions(
    [](auto registers, const float* z, const bool* counted, int64_t count, int64_t experts, float* columns)
        MOLEX_LAMBDA_INLINE {
          double totals[molex::kTogether] = {};
          for (int64_t t = 0; t < count; t += molex::kTogether) {
            const int64_t rows = std::min(molex::kTogether, count - t);
            float values[molex::kTogether], sums[molex::kTogether];
            short_logsumexp_of<registers.kLanes>(z + t * experts, rows, experts, columns, values, sums);
            for (int64_t i = 0; i < rows; ++i) {
              const double value = counted && !counted[t + i] ? 0.0f : values[i];
              totals[i] += value * value;
            }
          }
          double total = 0.0;
          for (double part : totals) total += part;
          return total;
        });

// As z_backward, of tokens with few experts, whose `columns` are scratch.
constexpr auto short_z_backward = molex::versions([](auto registers,
                                                     const float* z,
                                                     const bool* counted,
                                                     float grad,
                                                     int64_t count,
                                                     int64_t experts,
                                                     float* columns,
                                                     float* dz) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  for (int64_t t = 0; t < count; t += molex::kTogether) {
    const int64_t rows = std::min(molex::kTogether, count - t);
    float values[molex::kTogether], sums[molex::kTogether];
    short_logsumexp_of<kLanes>(z + t * experts, rows, experts, columns, values, sums);
    for (int64_t i = 0; i < molex::kTogether; ++i) values[i] *= grad / sums[i];
    for (int64_t i = 0; i < molex::kTogether; i += kLanes) {
      const auto share = molex::load<kLanes>(values + i);
      for (int64_t e = 0; e < experts; ++e) {
        float* const place = columns + e * molex::kTogether + i;
        molex::store(place, share * molex::load<kLanes>(place));
      }
    }
    molex::rows_of(columns, rows, experts, dz + t * experts);
  }
  clear_others(counted, count, experts, dz);
});

// sum_t logsumexp(z_t)^2 over the tokens that count.
constexpr auto sum_of_squares = molex::versions(
    [](auto registers, const float* z, const bool* counted, int64_t count, int64_t experts, float* row)
        MOLEX_LAMBDA_INLINE {
          float values[kChunk], sums[kChunk];
          logsumexp_of<registers.kLanes>(z, counted, count, experts, row, values, sums, nullptr);
          double total = 0.0;
          for (int64_t t = 0; t < count; ++t) total += static_cast<double>(values[t]) * values[t];
          return total;
        });

// dz_t = grad logsumexp(z_t) softmax(z_t); 0 for a token that does not count.
constexpr auto z_backward = molex::versions([](auto registers,
                                               const float* z,
                                               const bool* counted,
                                               float grad,
                                               int64_t count,
                                               int64_t experts,
                                               float* row,
                                               float* dz) MOLEX_LAMBDA_INLINE {
  float values[kChunk], sums[kChunk];
  logsumexp_of<registers.kLanes>(z, counted, count, experts, row, values, sums, dz);
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

// The sum of run(z, first, count, row) over the chunks, in their order, where `first` is a token.
template <class Run>
double sum_over_tokens(const Tensor& logits, const Run& run) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Tensor packed = torch::stable::contiguous(logits);
  const Source from = molex::source_of(packed);
  std::vector<double> sums(chunks_of(tokens), 0.0);
  for_chunks(tokens, std::max<int64_t>(experts, 1), [&](int64_t first, int64_t last, int64_t chunk) {
    const int64_t size = (last - first) * experts;
    std::vector<float> row(scratch_of(experts)), scratch(from.dtype == ScalarType::Float ? 0 : size);
    sums[chunk] =
        run(molex::read(from, first * experts, size, scratch.data()), first, last - first, row.data());
  });
  double total = 0.0;
  for (double sum : sums) total += sum;
  return total;
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
    std::vector<float> row(scratch_of(experts)), in(is_fp32 ? 0 : size), out(is_fp32 ? 0 : size);
    float* dz = molex::place(to, first * experts, out.data());
    run(molex::read(from, first * experts, size, in.data()), first, count, row.data(), dz);
    molex::write(to, first * experts, size, dz);
  });
  return result;
}

Tensor load_balance_fwd(const Tensor& logits,
                        const Tensor& index,
                        std::optional<Tensor> mask,
                        std::optional<Tensor> sequence,
                        std::optional<Tensor> totals,
                        double temperature,
                        bool per_assignment,
                        int64_t ranks) {
  const int64_t experts = logits.size(1), whole = molex::wide_of(experts);
  if (experts == 0) return scalar_like(logits, 0.0);
  const Counted counted(mask);
  const Balance balance(index, counted, sequence, totals, experts, per_assignment, ranks);
  const float scale = scale_at(temperature);
  const double loss = sum_over_tokens(logits, [&](const float* z, int64_t first, int64_t count, float* row) {
    const float* slopes = balance.slopes.data();
    const int64_t* places = balance.from(first);
    if (is_short(count, experts, places)) {
      return short_sum_of_balance(z, counted.from(first), slopes, scale, count, experts, row);
    }
    return sum_of_balance(z, counted.from(first), places, slopes, scale, count, experts, whole, row);
  });
  return scalar_like(logits, loss);
}

Tensor load_balance_bwd(const Tensor& grad,
                        const Tensor& logits,
                        const Tensor& index,
                        std::optional<Tensor> mask,
                        std::optional<Tensor> sequence,
                        std::optional<Tensor> totals,
                        double temperature,
                        bool per_assignment,
                        int64_t ranks) {
  const int64_t experts = logits.size(1), whole = molex::wide_of(experts);
  const Counted counted(mask);
  const Balance balance(index, counted, sequence, totals, experts, per_assignment, ranks);
  const float scale = scale_at(temperature), factor = scale * molex::scalar_of(grad);
  return logits_gradient(logits, [&](const float* z, int64_t first, int64_t count, float* row, float* dz) {
    const bool* here = counted.from(first);
    const int64_t* places = balance.from(first);
    const float* slopes = balance.slopes.data();
    if (is_short(count, experts, places)) {
      short_balance_backward(z, here, slopes, scale, factor, count, experts, row, dz);
      return;
    }
    balance_backward(z, here, places, slopes, scale, factor, count, experts, whole, row, dz);
  });
}

// 1 / the number of tokens of all ranks that count, times the number of ranks.
double share_of(const Counted& counted, int64_t tokens, const std::optional<Tensor>& total, int64_t ranks) {
  const int64_t number = total ? *total->const_data_ptr<int64_t>() : counted.number(tokens);
  return static_cast<double>(ranks) / static_cast<double>(std::max<int64_t>(number, 1));
}

Tensor router_z_fwd(const Tensor& logits,
                    std::optional<Tensor> mask,
                    std::optional<Tensor> total,
                    int64_t ranks) {
  const int64_t experts = logits.size(1);
  const Counted counted(mask);
  const double sum = sum_over_tokens(logits, [&](const float* z, int64_t first, int64_t count, float* row) {
    if (is_short(count, experts)) return short_sum_of_squares(z, counted.from(first), count, experts, row);
    return sum_of_squares(z, counted.from(first), count, experts, row);
  });
  return scalar_like(logits, sum * share_of(counted, logits.size(0), total, ranks));
}

Tensor router_z_bwd(const Tensor& grad,
                    const Tensor& logits,
                    std::optional<Tensor> mask,
                    std::optional<Tensor> total,
                    int64_t ranks) {
  const Counted counted(mask);
  const double share = share_of(counted, logits.size(0), total, ranks);
  const float upstream = static_cast<float>(2.0 * molex::scalar_of(grad) * share);
  return logits_gradient(logits, [&](const float* z, int64_t first, int64_t count, float* row, float* dz) {
    const int64_t experts = logits.size(1);
    if (is_short(count, experts)) {
      short_z_backward(z, counted.from(first), upstream, count, experts, row, dz);
    } else {
      z_backward(z, counted.from(first), upstream, count, experts, row, dz);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("load_balance_fwd", molex::cpu_kernel<&load_balance_fwd>);
  library.impl("load_balance_bwd", molex::cpu_kernel<&load_balance_bwd>);
  library.impl("router_z_fwd", molex::cpu_kernel<&router_z_fwd>);
  library.impl("router_z_bwd", molex::cpu_kernel<&router_z_bwd>);
}
