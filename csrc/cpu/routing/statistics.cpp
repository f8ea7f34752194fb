// Cluster statistics and feature weights on a CPU.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/common/indices.h"
#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "registration.h"

namespace {

using molex::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTable = 1 << 16;  // sums that are open at a time: they stay in the second cache
constexpr int64_t kChunk = 1024;     // tokens, at least, whose sums are added to those of others
constexpr int64_t kColumns = 16;     // features that are sorted together
constexpr int64_t kGrain = 16384;    // elements below which a thread is not worth waking

constexpr auto add_absolute = molex::versions(
    [](auto, float* to, const float* x, const float* mean, int64_t count) MOLEX_LAMBDA_INLINE {
      MOLEX_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) to[i] += std::fabs(x[i] - mean[i]);
    });

constexpr auto add_square = molex::versions(
    [](auto, float* to, const float* x, const float* mean, int64_t count) MOLEX_LAMBDA_INLINE {
      MOLEX_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) to[i] += (x[i] - mean[i]) * (x[i] - mean[i]);
    });

// Tokens [T, D] and the cluster of each. The label `clusters` marks tokens that belong to none.
struct Tokens {
  Source x;
  int64_t count, width, clusters;
  std::vector<int64_t> labels;
};

// out [C, D] = for each cluster the sum of what `add(to, x, c, feature, count)` adds for some features of its
// tokens. Chunks of tokens are summed separately and added in order. Their size depends on the shape alone.
template <class Add>
void sum_by_cluster(const Tokens& tokens, const Tensor& like, const Add& add, float* out) {
  const int64_t width = tokens.width, clusters = tokens.clusters, size = clusters * width;
  const int64_t chunk = std::max(kChunk, 4 * clusters);
  const int64_t chunks = std::max<int64_t>(1, (tokens.count + chunk - 1) / chunk);
  const int64_t block =
      std::clamp<int64_t>(kTable / std::max<int64_t>(clusters, 1), 16, std::max<int64_t>(width, 16));
  const int64_t blocks = (width + block - 1) / block,
                grain = tokens.count * width < kGrain ? chunks * blocks : 1;
  Tensor partial = molex::new_result(like, {chunks > 1 ? chunks * size : 0}, ScalarType::Float);
  float* sums = chunks > 1 ? partial.mutable_data_ptr<float>() : out;
  torch::stable::parallel_for(0, chunks * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(block);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / blocks, first = task % blocks * block,
                    count = std::min(block, width - first);
      float* table = sums + part * size + first;
      for (int64_t c = 0; c < clusters; ++c) std::fill_n(table + c * width, count, 0.0f);
      for (int64_t t = part * chunk; t < std::min(tokens.count, (part + 1) * chunk); ++t) {
        const int64_t c = tokens.labels[t];
        if (c == clusters) continue;
        add(table + c * width,
            molex::read(tokens.x, t * width + first, count, scratch.data()),
            c,
            first,
            count);
      }
    }
  });
  if (chunks == 1) return;
  torch::stable::parallel_for(
      0, clusters, std::max<int64_t>(1, kGrain / (width * chunks + 1)), [&](int64_t begin, int64_t end) {
        std::copy(sums + begin * width, sums + end * width, out + begin * width);
        for (int64_t part = 1; part < chunks; ++part) {
          molex::add(out + begin * width, sums + part * size + begin * width, (end - begin) * width);
        }
      });
}

// sum_{i != j} |x_i - x_j| / (n - 1) = 2 / (n - 1) sum_r (2r - n + 1) (x_(r) - mean) over the sorted values.
float pairwise(float* values, int64_t count, float mean) {
  // NaN cannot be sorted, and x - mean is NaN if x or the mean is infinite.
  if (!std::isfinite(mean)) return std::numeric_limits<float>::quiet_NaN();
  std::sort(values, values + count);
  double half = 0.0;
  for (int64_t rank = 0; rank < count; ++rank) {
    half += static_cast<double>(2 * rank - count + 1) * (values[rank] - mean);
  }
  return static_cast<float>(2.0 * half / std::max<int64_t>(count - 1, 1));
}

// Computes the pairwise statistic of each cluster and feature. `out` holds the clusters' means [C, D], which
// the results replace.
void pairwise_statistics(const Tokens& tokens, const std::vector<int64_t>& sizes, float* out) {
  std::vector<int64_t> starts(tokens.clusters + 1, 0), order(tokens.count);
  for (int64_t c = 0; c < tokens.clusters; ++c) starts[c + 1] = starts[c] + sizes[c];
  std::vector<int64_t> next(starts.begin(), starts.end());
  for (int64_t t = 0; t < tokens.count; ++t) {
    if (tokens.labels[t] < tokens.clusters) order[next[tokens.labels[t]]++] = t;
  }
  const int64_t width = tokens.width, members = starts.back(), blocks = (width + kColumns - 1) / kColumns;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(members * kColumns);
    float scratch[kColumns];
    for (int64_t first = begin * kColumns; first < std::min(end * kColumns, width); first += kColumns) {
      const int64_t count = std::min(kColumns, width - first);
      for (int64_t r = 0; r < members; ++r) {
        const float* row = molex::read(tokens.x, order[r] * width + first, count, scratch);
        for (int64_t i = 0; i < count; ++i) values[i * members + r] = row[i];
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < tokens.clusters; ++c) {
          float& value = out[c * width + first + i];
          value = pairwise(values.data() + i * members + starts[c], sizes[c], value);
        }
      }
    }
  });
}

// Sums or deviations [C, D] and sizes [C] of the clusters. If `sums` and `counts` are given, they cover more
// tokens than these.
std::tuple<Tensor, Tensor> cluster_statistics(const Tensor& x,
                                              const Tensor& cluster,
                                              std::optional<Tensor> sums,
                                              std::optional<Tensor> counts,
                                              int64_t num_clusters,
                                              std::string stat) {
  const int64_t width = x.size(1);
  const Tensor rows = torch::stable::contiguous(x);
  const Tokens tokens{
      molex::source_of(rows), x.size(0), width, num_clusters, molex::labels_of(cluster, num_clusters)};
  std::vector<int64_t> own(num_clusters + 1, 0);
  for (int64_t label : tokens.labels) ++own[label];
  Tensor totals = molex::new_result(x, {num_clusters, width}, ScalarType::Float);
  Tensor sizes = molex::new_result(x, {num_clusters}, ScalarType::Int);
  float* out = totals.mutable_data_ptr<float>();
  std::copy_n(own.begin(), num_clusters, sizes.mutable_data_ptr<int32_t>());
  const std::optional<Tensor> given_sums = molex::packed(sums), given_counts = molex::packed(counts);
  const float* known = given_sums ? given_sums->const_data_ptr<float>() : nullptr;
  const int32_t* members = (given_counts ? *given_counts : sizes).const_data_ptr<int32_t>();

  if (known) {
    std::copy_n(known, num_clusters * width, out);
  } else {
    const auto add = [](float* to, const float* row, int64_t, int64_t, int64_t count) {
      molex::add(to, row, count);
    };
    sum_by_cluster(tokens, x, add, out);
  }
  if (stat == "sum") return {totals, sizes};
  for (int64_t c = 0; c < num_clusters; ++c) {
    const float size = static_cast<float>(std::max(members[c], 1));
    for (int64_t i = 0; i < width; ++i) out[c * width + i] /= size;
  }
  if (stat == "pairwise") {
    pairwise_statistics(tokens, own, out);
    return {totals, sizes};
  }
  Tensor deviations = molex::new_result(totals, {num_clusters, width});
  const bool absolute = stat == "mad";
  const auto add = [&](float* to, const float* row, int64_t c, int64_t first, int64_t count) {
    const float* mean = out + c * width + first;
    absolute ? add_absolute(to, row, mean, count) : add_square(to, row, mean, count);
  };
  sum_by_cluster(tokens, x, add, deviations.mutable_data_ptr<float>());
  return {deviations, sizes};
}

// W = 1 / (s + eps), clipped and normalised; see reference.py.
Tensor feature_weights(
    const Tensor& deviations, const Tensor& counts, double eps, double clip, std::string norm, bool mask) {
  const Tensor packed = torch::stable::contiguous(deviations), sizes = torch::stable::contiguous(counts);
  const int64_t clusters = packed.size(0), width = packed.size(1);
  const float* s = packed.const_data_ptr<float>();
  const int32_t* members = sizes.const_data_ptr<int32_t>();
  Tensor result = molex::new_result(packed, {clusters, width});
  float* w = result.mutable_data_ptr<float>();
  const auto present = [&](int64_t c) { return !mask || members[c] > 0; };
  // The minimum is NaN if either value is.
  const auto minimum = [](float value, float limit) {
    return value <= limit || std::isnan(value) ? value : limit;
  };

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("cluster_statistics", molex::cpu_kernel<&cluster_statistics>);
  library.impl("feature_weights", molex::cpu_kernel<&feature_weights>);
}
