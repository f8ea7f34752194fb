// The choice of a token's experts by its logits: the K best, their weights, and the gradient of the logits.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common/columns.h"
#include "cpu/common/rows.h"
#include "cpu/common/softmax.h"

namespace molex::router {

enum class Score { kSoftmax, kSigmoid, kChosen, kLogits, kSqrtSoftplus };

inline Score score_of(const std::string& name) {
  if (name == "softmax") return Score::kSoftmax;
  if (name == "sigmoid") return Score::kSigmoid;
  if (name == "logits") return Score::kLogits;
  if (name == "sqrtsoftplus") return Score::kSqrtSoftplus;
  STD_TORCH_CHECK(name == "softmax_topk", "score: unknown score ", name);
  return Score::kChosen;
}

// The softplus whose square root is a score is at least this.
constexpr float kLeast = std::numeric_limits<float>::min();

// log(1 + e^z). The logarithm of 1 + u, u = e^-|z|, is 2 atanh(u / (2 + u)), which keeps a small u.
MOLEX_INLINE float softplus_of(float z) {
  const float u = exp_of(z > 0.0f ? -z : z), r = u / (2.0f + u), s = r * r;
  float p = 1.0f / 17.0f;
  for (const float odd : {15.0f, 13.0f, 11.0f, 9.0f, 7.0f, 5.0f, 3.0f}) p = p * s + 1.0f / odd;
  return (z > 0.0f ? z : 0.0f) + (2.0f * r + 2.0f * r * s * p);
}

MOLEX_INLINE float sqrt_softplus_of(float z) {
  const float found = softplus_of(z);
  return std::sqrt(found < kLeast ? kLeast : found);
}

// How the weights of the chosen experts follow from their logits.
struct Weighing {
  Weighing(const std::string& name, bool over_sum, double factor)
      : score(score_of(name)), renormalize(over_sum), scaling(static_cast<float>(factor)) {}

  // Whether the weights are a softmax over the chosen experts: also what softmax and sigmoid are over their
  // sum, as the softmax of their logarithms, which has no 0/0.
  bool chosen() const {
    return score == Score::kChosen || (renormalize && (score == Score::kSoftmax || score == Score::kSigmoid));
  }

  // A score that is one logit's alone.
  float elementwise(float z) const {
    switch (score) {
      case Score::kSigmoid:
        return sigmoid_of(z);
      case Score::kSqrtSoftplus:
        return sqrt_softplus_of(z);
      default:
        return z;
    }
  }

  Score score;
  bool renormalize;
  float scaling;
};

// Replaces columns of logits by the softmax over each token's, or over their log sigmoid, times `scaling`.
inline constexpr auto softmax_in_columns = versions(
    [](auto registers, float* columns, int64_t count, bool sigmoid, float scaling) MOLEX_LAMBDA_INLINE {
      constexpr int kLanes = registers.kLanes;
      for (int64_t i = 0; sigmoid && i < count * kTogether; ++i) {
        columns[i] = -softplus_of(-columns[i]);
      }
      for (int64_t i = 0; i < kTogether; i += kLanes) {
        const auto inverse = 1.0f / column_exponentials<kLanes>(columns + i, 1.0f, count).sum;
        for (int64_t k = 0; k < count; ++k) {
          float* const place = columns + k * kTogether + i;
          store(place, scaling * (inverse * load<kLanes>(place)));
        }
      }
    });

// Returns the index of the first largest value and sets that value to -inf, so that the next call finds the
// next one. The values fill whole vectors, and none is NaN.
inline constexpr auto take_largest =
    versions([](auto registers, float* key, int64_t whole) MOLEX_LAMBDA_INLINE {
      constexpr int kLanes = registers.kLanes;
      Floats<kLanes> most = load<kLanes>(key);
      Ints<kLanes> where = count_from<kLanes>(0);
      for (int64_t i = kLanes; i < whole; i += kLanes) {
        const Floats<kLanes> values = load<kLanes>(key + i);
        const Ints<kLanes> above = values > most;
        most = select(above, values, most);
        where = select(above, count_from<kLanes>(static_cast<int32_t>(i)), where);
      }
      const float largest = largest_lane(most);
      // Where it is not the largest, a lane stands for no index.
      const auto lower = [](auto a, auto b) MOLEX_LAMBDA_INLINE { return select(a < b, a, b); };
      const auto last = Ints<kLanes>{} + static_cast<int32_t>(whole);
      const int64_t best = folded(select(most == largest, where, last), lower)[0];
      key[best] = -std::numeric_limits<float>::infinity();
      return best;
    });

// Of the groups of equal size in which the experts stand, those that may be chosen from.
struct Groups {
  int64_t count, top;
};

// Finds the K largest keys of a token, in descending order, and their weights. Of equal keys the lower expert
// wins; NaN and -inf come last.
class TopK {
 public:
  TopK(const std::optional<Tensor>& expert_bias,
       int64_t experts,
       int64_t top_k,
       const Groups& groups,
       const Weighing& weighing)
      : bias_(floats_of(expert_bias)), experts_(experts), top_k_(top_k), groups_(groups), to_(weighing) {}

  // Of `count` <= kTogether tokens, whose logits are `stride` apart. `scratch` has size() floats.
  void operator()(
      const float* z, int64_t stride, int64_t count, int64_t* chosen, float* weights, float* scratch) const {
    for (int64_t t = 0; t < count; ++t)
      choose(z + t * stride, chosen + t * top_k_, weights + t * top_k_, scratch);
    if (to_.chosen()) weigh_together(z, stride, count, chosen, weights, picked(scratch));
  }

  // The weights of given experts, of which those outside [0, E) are -1 and get 0.
  void given(const float* z,
             int64_t stride,
             int64_t count,
             const int64_t* chosen,
             float* weights,
             float* scratch) const {
    if (to_.chosen()) return weigh_together(z, stride, count, chosen, weights, picked(scratch));
    for (int64_t t = 0; t < count; ++t, z += stride) {
      const float* probability = probability_of(z, scratch);
      weigh(z, probability, chosen + t * top_k_, weights + t * top_k_, picked(scratch));
    }
  }

  int64_t size() const { return 2 * wide_of(experts_) + kTogether * top_k_ + wide_of(groups_.count); }

 private:
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  static float finite(float value) {
    constexpr float least = std::numeric_limits<float>::lowest();
    return value > least ? value : least;
  }

  // The parts of the scratch: keys, probabilities, what becomes weights, sums of groups.
  float* probabilities(float* scratch) const { return scratch + wide_of(experts_); }
  float* picked(float* scratch) const { return probabilities(scratch) + wide_of(experts_); }
  float* group_sums(float* scratch) const { return picked(scratch) + kTogether * top_k_; }

  // The softmax of all logits of a token, or null where the score is another.
  const float* probability_of(const float* z, float* scratch) const {
    if (to_.score != Score::kSoftmax) return nullptr;
    softmax_of(z, probabilities(scratch), experts_);
    return probabilities(scratch);
  }

  // The choice of one token, and its weights unless these are made together.
  void choose(const float* z, int64_t* chosen, float* weights, float* key) const {
    const int64_t whole = wide_of(experts_);
    // A softmax over all logits is needed for the keys with a bias, and for weights that are not over their
    // sum.
    const bool softmax = !bias_.empty() || !to_.chosen();
    const float* probability = softmax ? probability_of(z, key) : nullptr;
    for (int64_t e = 0; e < experts_; ++e) {
      float value = z[e];
      if (!bias_.empty()) value = (probability ? probability[e] : to_.elementwise(z[e])) + bias_[e];
      key[e] = finite(value);
    }
    std::fill(key + experts_, key + whole, kLowest);
    if (groups_.top < groups_.count) keep_groups(key, group_sums(key));
    for (int64_t k = 0; k < top_k_; ++k) chosen[k] = take_largest(key, whole);
    if (!to_.chosen()) weigh(z, probability, chosen, weights, picked(key));
  }

  // Sets the keys outside of the groups with the largest sum of their two best keys to -inf.
  void keep_groups(float* key, float* sums) const {
    const int64_t size = experts_ / groups_.count, whole = wide_of(groups_.count);
    for (int64_t g = 0; g < groups_.count; ++g) {
      float first = kLowest, second = kLowest;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        second = std::max(second, std::min(first, key[e]));
        first = std::max(first, key[e]);
      }
      sums[g] = size > 1 ? finite(first + second) : first;
    }
    std::fill(sums + groups_.count, sums + whole, kLowest);
    for (int64_t i = 0; i < groups_.top; ++i) take_largest(sums, whole);
    for (int64_t g = 0; g < groups_.count; ++g) {
      if (sums[g] != kLowest) std::fill_n(key + g * size, size, kLowest);
    }
  }

  // Weights that are no softmax over the chosen. `probability` is the softmax of all logits, where that is
  // the score.
  void weigh(
      const float* z, const float* probability, const int64_t* chosen, float* weights, float* picked) const {
    int64_t known = 0;
    for (int64_t k = 0; k < top_k_; ++k) {
      if (chosen[k] < 0) continue;
      picked[known++] = probability ? probability[chosen[k]] : to_.elementwise(z[chosen[k]]);
    }
    if (to_.renormalize) {
      float sum = 0.0f;
      for (int64_t k = 0; k < known; ++k) sum += picked[k];
      for (int64_t k = 0; k < known; ++k) picked[k] /= sum;
    }
    for (int64_t k = 0; k < top_k_; ++k) weights[k] = chosen[k] >= 0 ? to_.scaling * *picked++ : 0.0f;
  }

  // The softmax over the chosen experts of `count` <= kTogether tokens, in columns [K, kTogether].
  void weigh_together(const float* z,
                      int64_t stride,
                      int64_t count,
                      const int64_t* chosen,
                      float* weights,
                      float* columns) const {
    for (int64_t i = 0; i < kTogether; ++i) {
      const int64_t t = i < count ? i : 0;
      for (int64_t k = 0; k < top_k_; ++k) {
        const int64_t expert = chosen[t * top_k_ + k];
        columns[k * kTogether + i] = expert < 0 ? kLowest : z[t * stride + expert];
      }
    }
    softmax_in_columns(columns, top_k_, to_.score == Score::kSigmoid, to_.scaling);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < top_k_; ++k) {
        const int64_t at = i * top_k_ + k;
        weights[at] = chosen[at] < 0 ? 0.0f : columns[k * kTogether + i];
      }
    }
  }

  std::vector<float> bias_;
  int64_t experts_, top_k_;
  Groups groups_;
  Weighing to_;
};

// What the backward pass reads of the logits [T, E] and of the choice [T, K].
struct Choice {
  const float *logits, *weight;
  const int64_t* index;
  const float *grad_weight, *grad_logits;  // null where there is none
  int64_t experts, top_k;
  Weighing to;
};

// dw / dz of an expert, over w.
MOLEX_INLINE float rate_of(const Weighing& to, float z, float weight, float inverse) {
  if (to.score == Score::kSigmoid) return to.renormalize ? sigmoid_of(-z) : 1.0f - weight * inverse;
  if (to.score != Score::kSqrtSoftplus) return 1.0f;
  const float softplus = softplus_of(z);
  return softplus > kLeast ? sigmoid_of(z) / (2.0f * softplus) : 0.0f;
}

// Writes the gradient of one token's logits, from the gradients of its weights and of the logits themselves.
inline void logits_gradient(const Choice& c, int64_t t, float* dz, float* probability) {
  if (c.grad_logits) {
    std::copy_n(c.grad_logits + t * c.experts, c.experts, dz);
  } else {
    std::fill_n(dz, c.experts, 0.0f);
  }
  if (!c.grad_weight) return;
  const float *g = c.grad_weight + t * c.top_k, *w = c.weight + t * c.top_k, *z = c.logits + t * c.experts;
  const int64_t* expert = c.index + t * c.top_k;
  const Weighing& to = c.to;
  // A scaling below the normal numbers leaves weights of 0.
  const float inverse = std::abs(to.scaling) < kLeast ? 0.0f : 1.0f / to.scaling;
  float dot = 0.0f, sum = 0.0f;
  for (int64_t k = 0; k < c.top_k; ++k) {
    if (expert[k] >= 0) dot += g[k] * w[k], sum += z[expert[k]];
  }
  const float mean = to.chosen() || to.renormalize ? dot * inverse : 0.0f;
  for (int64_t k = 0; k < c.top_k; ++k) {
    if (expert[k] < 0) continue;
    float& to_z = dz[expert[k]];
    if (to.score == Score::kLogits) {  // a weight over its logit would be 0/0 at 0
      to_z += to.renormalize ? (to.scaling * g[k] - dot) / sum : to.scaling * g[k];
    } else {
      to_z += w[k] * ((g[k] - mean) * rate_of(to, z[expert[k]], w[k], inverse));
    }
  }
  if (to.score == Score::kSoftmax && !to.renormalize) {
    softmax_of(z, probability, c.experts);
    add_scaled(dz, probability, -dot, c.experts);
  }
}

}  // namespace molex::router
