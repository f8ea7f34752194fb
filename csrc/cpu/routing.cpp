// Routing on a CPU: cluster statistics, feature weights, and the router around ATen's matrix product.
//
// Statistics are taken feature block by feature block: a block's means and deviations read the same
// cache-resident columns, and each sum runs over the tokens in order, whatever the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "indices.h"
#include "memory.h"
#include "rows.h"
#include "softmax.h"

namespace {

using molex::labels_of;
using molex::sigmoid_of;
using molex::softmax_of;
using molex::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 64;     // features of a block
constexpr int64_t kGrain = 16384;  // elements below which a thread is not worth waking

// What is added up for each cluster. `x` holds one block of features, its rows `stride` apart.
enum class Sum { kPlain, kAbsolute, kSquare };

template <Sum SUM, bool FULL>
MOLEX_INLINE void add_rows(float* table,
                           const float* means,
                           const float* x,
                           int64_t stride,
                           const int64_t* labels,
                           int64_t tokens,
                           int64_t width) {
  const int64_t count = FULL ? kBlock : width;
  for (int64_t t = 0; t < tokens; ++t) {
    const float *row = x + t * stride, *mean = means + labels[t] * kBlock;
    float* to = table + labels[t] * kBlock;
    MOLEX_INDEPENDENT
    for (int64_t i = 0; i < count; ++i) {
      const float centred = SUM == Sum::kPlain ? row[i] : row[i] - mean[i];
      to[i] += SUM == Sum::kPlain ? centred : SUM == Sum::kAbsolute ? std::fabs(centred) : centred * centred;
    }
  }
}

#define MOLEX_ADD(NAME, SUM)                                                                     \
  MOLEX_CLONES void NAME(float* table,                                                           \
                         const float* means,                                                     \
                         const float* x,                                                         \
                         int64_t stride,                                                         \
                         const int64_t* labels,                                                  \
                         int64_t tokens,                                                         \
                         int64_t width) {                                                        \
    width == kBlock ? add_rows<Sum::SUM, true>(table, means, x, stride, labels, tokens, width)   \
                    : add_rows<Sum::SUM, false>(table, means, x, stride, labels, tokens, width); \
  }
MOLEX_ADD(add_plain, kPlain)
MOLEX_ADD(add_absolute, kAbsolute)
MOLEX_ADD(add_square, kSquare)

// One block of features: rows [num_clusters + 1, kBlock], the last one for tokens that take no part.
class Table {
 public:
  explicit Table(int64_t num_clusters) : data_((num_clusters + 1) * kBlock) {}
  float* operator[](int64_t cluster) { return data_.data() + cluster * kBlock; }
  void clear() { std::fill(data_.begin(), data_.end(), 0.0f); }

 private:
  std::vector<float> data_;
};

// sum_{i != j} |x_i - x_j| / (n - 1) = 2 / (n - 1) sum_r (2r - n + 1) (x_(r) - mean) over the sorted values.
float pairwise(float* values, int64_t count, float mean) {
  std::sort(values, values + count);
  double half = 0.0;
  for (int64_t rank = 0; rank < count; ++rank) {
    half += static_cast<double>(2 * rank - count + 1) * (values[rank] - mean);
  }
  return static_cast<float>(2.0 * half / std::max<int64_t>(count - 1, 1));
}

std::tuple<Tensor, Tensor> cluster_statistics_cpu(const Tensor& x,
                                                  const Tensor& cluster,
                                                  std::optional<Tensor> sums,
                                                  std::optional<Tensor> counts,
                                                  int64_t num_clusters,
                                                  std::string stat) {
  const int64_t tokens = x.size(0), width = x.size(1);
  const Tensor rows = torch::stable::contiguous(x);
  const Source from = molex::source_of(rows);
  const std::vector<int64_t> labels = labels_of(cluster, num_clusters);
  Tensor totals = molex::new_result(x, {num_clusters, width}, ScalarType::Float);
  Tensor sizes = torch::stable::new_zeros(x, {num_clusters}, ScalarType::Int);
  float* out = totals.mutable_data_ptr<float>();
  int32_t* own = sizes.mutable_data_ptr<int32_t>();
  for (int64_t label : labels) {
    if (label < num_clusters) ++own[label];
  }
  const std::optional<Tensor> given_sums = molex::packed(sums), given_counts = molex::packed(counts);
  const float* known = given_sums ? given_sums->const_data_ptr<float>() : nullptr;
  const int32_t* members = given_counts ? given_counts->const_data_ptr<int32_t>() : own;

  // For pairwise, the tokens in cluster order.
  std::vector<int64_t> starts(num_clusters + 1, 0), order;
  if (stat == "pairwise") {
    for (int64_t c = 0; c < num_clusters; ++c) starts[c + 1] = starts[c] + own[c];
    order.resize(starts[num_clusters]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t t = 0; t < tokens; ++t) {
      if (labels[t] < num_clusters) order[next[labels[t]]++] = t;
    }
  }

  const int64_t blocks = (width + kBlock - 1) / kBlock;
  const int64_t grain = tokens * width < kGrain ? blocks : 1;
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    Table sum(num_clusters), total(num_clusters);
    std::vector<float> widened(from.dtype == ScalarType::Float ? 0 : tokens * kBlock), values(order.size());
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, width - first);
      const float* columns = widened.data();
      int64_t stride = kBlock;
      if (from.dtype == ScalarType::Float) {
        columns = static_cast<const float*>(from.data) + first;
        stride = width;
      } else {
        for (int64_t t = 0; t < tokens; ++t) {
          molex::read(from, t * width + first, count, widened.data() + t * kBlock);
        }
      }
      if (known) {
        for (int64_t c = 0; c < num_clusters; ++c) std::copy_n(known + c * width + first, count, sum[c]);
      } else {
        sum.clear();
        add_plain(sum[0], sum[0], columns, stride, labels.data(), tokens, count);
      }
      Table* result = &sum;
      if (stat != "sum") {
        for (int64_t c = 0; c < num_clusters; ++c) {
          for (int64_t i = 0; i < count; ++i) sum[c][i] /= static_cast<float>(std::max(members[c], 1));
        }
        result = &total;
        if (stat == "pairwise") {
          for (int64_t i = 0; i < count; ++i) {
            for (size_t r = 0; r < order.size(); ++r) values[r] = columns[order[r] * stride + i];
            for (int64_t c = 0; c < num_clusters; ++c) {
              total[c][i] = pairwise(values.data() + starts[c], starts[c + 1] - starts[c], sum[c][i]);
            }
          }
        } else {
          total.clear();
          const auto add = stat == "mad" ? add_absolute : add_square;
          add(total[0], sum[0], columns, stride, labels.data(), tokens, count);
        }
      }
      for (int64_t c = 0; c < num_clusters; ++c) std::copy_n((*result)[c], count, out + c * width + first);
    }
  });
  return {totals, sizes};
}

// W = 1 / (s + eps), clipped and normalised; see reference.py.
Tensor feature_weights_cpu(
    const Tensor& deviations, const Tensor& counts, double eps, double clip, std::string norm, bool mask) {
  const Tensor packed = torch::stable::contiguous(deviations), sizes = torch::stable::contiguous(counts);
  const int64_t clusters = packed.size(0), width = packed.size(1);
  const float* s = packed.const_data_ptr<float>();
  const int32_t* members = sizes.const_data_ptr<int32_t>();
  Tensor result = molex::new_result(packed, {clusters, width});
  float* w = result.mutable_data_ptr<float>();
  const auto present = [&](int64_t c) { return !mask || members[c] > 0; };
  const auto minimum = [](float value, float limit) { return value > limit ? limit : value; };  // NaN stays

  int64_t rows = 0;
  double before = 0.0;
  for (int64_t c = 0; c < clusters; ++c) {
    if (!present(c)) continue;
    ++rows;
    const float size = static_cast<float>(std::max(members[c], 1));
    double sum = 0.0;
    for (int64_t i = c * width; i < (c + 1) * width; ++i) {
      w[i] = 1.0f / (s[i] / size + static_cast<float>(eps));
      sum += w[i];
    }
    before += sum;
  }
  const double all = static_cast<double>(std::max<int64_t>(rows, 1));
  before /= all * static_cast<double>(width);
  const float limit =
      std::isfinite(clip) ? static_cast<float>(clip * before) : std::numeric_limits<float>::infinity();
  std::vector<double> columns(width, 0.0);
  double after = 0.0;
  for (int64_t c = 0; c < clusters; ++c) {
    if (!present(c)) continue;
    for (int64_t i = 0; i < width; ++i) {
      w[c * width + i] = minimum(w[c * width + i], limit);
      columns[i] += w[c * width + i];
    }
  }
  for (double column : columns) after += column;
  std::vector<float> divisors(width, 1.0f);
  for (int64_t i = 0; i < width; ++i) {
    if (norm == "feature_post") divisors[i] = static_cast<float>(columns[i] / all);
    if (norm == "global_pre") divisors[i] = static_cast<float>(before);
    if (norm == "global_post") divisors[i] = static_cast<float>(after / (all * static_cast<double>(width)));
  }
  for (int64_t c = 0; c < clusters; ++c) {
    for (int64_t i = 0; i < width; ++i) w[c * width + i] = present(c) ? w[c * width + i] / divisors[i] : 1.0f;
  }
  return result;
}

MOLEX_CLONES void multiply(float* to, const float* left, const float* right, float scale, int64_t count) {
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] = scale * left[i] * right[i];
}

MOLEX_CLONES void add_product(float* to, const float* left, const float* right, float scale, int64_t count) {
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) to[i] += scale * left[i] * right[i];
}

// out = w x, with w_tq = sum_m mix_tm W[label_tm, q], and 1 in place of W for a label outside [0, C).
void weigh_tokens_cpu(
    const Tensor& x, const Tensor& table, const Tensor& labels, std::optional<Tensor> mix, Tensor out) {
  const int64_t tokens = x.size(0), width = x.size(1), clusters = table.size(0), parts = labels.size(1);
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const Tensor rows = torch::stable::contiguous(x), weights = torch::stable::contiguous(table);
  const std::optional<Tensor> shares = molex::packed(mix);
  const Source from = molex::source_of(rows), share = molex::source_of(shares);
  const molex::Target to = molex::target_of(out);
  const float* w = weights.const_data_ptr<float>();
  const std::vector<int64_t> cluster = labels_of(labels, clusters);
  const std::vector<float> ones(width, 1.0f);
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
        std::vector<float> scratch(width), sum(width);
        for (int64_t t = begin; t < end; ++t) {
          const float* token = molex::read(from, t * width, width, scratch.data());
          float* row = molex::place(to, t * width, sum.data());
          for (int64_t m = 0; m < parts; ++m) {
            const int64_t label = cluster[t * parts + m];
            const float* weight = label < clusters ? w + label * width : ones.data();
            float spare;
            const float scale = share ? *molex::read(share, t * parts + m, 1, &spare) : 1.0f;
            m == 0 ? multiply(row, token, weight, scale, width)
                   : add_product(row, token, weight, scale, width);
          }
          molex::write(to, t * width, width, row);
        }
      });
}

// The K largest keys, descending, ties to the lower expert, NaN and -inf lowest; and their scores.
std::tuple<Tensor, Tensor> select_experts_cpu(const Tensor& logits,
                                              std::optional<Tensor> expert_bias,
                                              int64_t top_k,
                                              std::string score) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  const Tensor packed = torch::stable::contiguous(logits);
  const float* z = packed.const_data_ptr<float>();
  std::vector<float> bias(expert_bias ? experts : 0);
  if (expert_bias) {
    const Tensor biases = torch::stable::contiguous(*expert_bias);
    const float* from = molex::read(molex::source_of(biases), 0, experts, bias.data());
    if (from != bias.data()) std::copy_n(from, experts, bias.data());
  }
  Tensor index = molex::new_result(logits, {tokens, top_k}, ScalarType::Long);
  Tensor weight = molex::new_result(logits, {tokens, top_k}, ScalarType::Float);
  int64_t* chosen = index.mutable_data_ptr<int64_t>();
  float* scores = weight.mutable_data_ptr<float>();
  const bool softmax = score == "softmax", sigmoid = score == "sigmoid", biased = expert_bias.has_value();
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / experts), [&](int64_t begin, int64_t end) {
        std::vector<float> key(experts), probability(molex::wide_of(experts)), picked(molex::wide_of(top_k));
        for (int64_t t = begin; t < end; ++t) {
          const float* row = z + t * experts;
          if (softmax) softmax_of(row, probability.data(), experts);
          for (int64_t e = 0; e < experts; ++e) {
            float value = row[e];
            if (biased) value = (softmax ? probability[e] : sigmoid ? sigmoid_of(row[e]) : row[e]) + bias[e];
            key[e] = value > kLowest ? value : kLowest;
          }
          for (int64_t k = 0; k < top_k; ++k) {
            int64_t best = 0;
            for (int64_t e = 1; e < experts; ++e) {
              if (key[e] > key[best]) best = e;
            }
            key[best] = -std::numeric_limits<float>::infinity();
            chosen[t * top_k + k] = best;
            picked[k] = softmax ? probability[best] : sigmoid ? sigmoid_of(row[best]) : row[best];
          }
          if (!softmax && !sigmoid) softmax_of(picked.data(), picked.data(), top_k);
          std::copy_n(picked.data(), top_k, scores + t * top_k);
        }
      });
  return {index, weight};
}

// Gradient of the logits from those of the scores and of the logits themselves.
Tensor router_logits_bwd_cpu(const Tensor& logits,
                             const Tensor& index,
                             const Tensor& weight,
                             std::optional<Tensor> grad_weight,
                             std::optional<Tensor> grad_logits,
                             std::string score) {
  const int64_t tokens = logits.size(0), experts = logits.size(1), top_k = index.size(1);
  const Tensor z = torch::stable::contiguous(logits), ids = torch::stable::contiguous(index);
  const Tensor scores = torch::stable::contiguous(weight);
  const std::optional<Tensor> of_weight = molex::packed(grad_weight), of_logits = molex::packed(grad_logits);
  const float* upstream = of_weight ? of_weight->const_data_ptr<float>() : nullptr;
  const float* direct = of_logits ? of_logits->const_data_ptr<float>() : nullptr;
  const float *from = z.const_data_ptr<float>(), *w = scores.const_data_ptr<float>();
  const int64_t* chosen = ids.const_data_ptr<int64_t>();
  Tensor result = molex::new_result(logits, {tokens, experts});
  float* out = result.mutable_data_ptr<float>();
  const bool softmax = score == "softmax", sigmoid = score == "sigmoid";
  torch::stable::parallel_for(
      0, tokens, std::max<int64_t>(1, kGrain / experts), [&](int64_t begin, int64_t end) {
        std::vector<float> probability(molex::wide_of(experts));
        for (int64_t t = begin; t < end; ++t) {
          float* dz = out + t * experts;
          if (direct) {
            std::copy_n(direct + t * experts, experts, dz);
          } else {
            std::fill_n(dz, experts, 0.0f);
          }
          if (!upstream) continue;
          const float *g = upstream + t * top_k, *s = w + t * top_k;
          float along = 0.0f;
          for (int64_t k = 0; k < top_k; ++k) along += g[k] * s[k];
          for (int64_t k = 0; k < top_k; ++k) {
            const float slope = sigmoid ? 1.0f - s[k] : 1.0f;
            dz[chosen[t * top_k + k]] += s[k] * (softmax || sigmoid ? g[k] * slope : g[k] - along);
          }
          if (softmax) {
            softmax_of(from + t * experts, probability.data(), experts);
            for (int64_t e = 0; e < experts; ++e) dz[e] -= probability[e] * along;
          }
        }
      });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("cluster_statistics_cpu", TORCH_BOX(&cluster_statistics_cpu));
  library.impl("feature_weights_cpu", TORCH_BOX(&feature_weights_cpu));
  library.impl("weigh_tokens_cpu", TORCH_BOX(&weigh_tokens_cpu));
  library.impl("select_experts_cpu", TORCH_BOX(&select_experts_cpu));
  library.impl("router_logits_bwd_cpu", TORCH_BOX(&router_logits_bwd_cpu));
}
