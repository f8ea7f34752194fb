// The choice of a token's experts by its logits: the K best, their weights, and the gradient of the logits.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "cpu/common/indices.h"
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

  // What becomes a weight by `finish`.
  float start(float z) const {
    if (!chosen()) return elementwise(z);
    return score == Score::kSigmoid ? -softplus_of(-z) : z;
  }

  // Makes weights of `count` values, which fill whole vectors.
  void finish(float* values, int64_t count) const {
    if (chosen()) {
      softmax_of(values, values, count);
    } else if (renormalize) {
      float sum = 0.0f;
      for (int64_t k = 0; k < count; ++k) sum += values[k];
      for (int64_t k = 0; k < count; ++k) values[k] /= sum;
    }
    if (scaling != 1.0f) scale(values, scaling, count);
  }

  Score score;
  bool renormalize;
  float scaling;
};

// Returns the index of the first largest value and sets that value to -inf, so that the next call finds the
// next one. The values fill whole vectors, and none is NaN.
inline constexpr auto take_largest = versions([](auto, float* key, int64_t whole) MOLEX_LAMBDA_INLINE {
  const Ints<kWide> lanes = count_from<kWide>(0);
  Wide most = load(key);
  Ints<kWide> where = lanes;
  for (int64_t i = kWide; i < whole; i += kWide) {
    const Wide values = load(key + i);
    const Ints<kWide> above = values > most;
    most = select(above, values, most);
    where = select(above, lanes + static_cast<int32_t>(i), where);
  }
  const float largest = largest_lane(most);
  int64_t best = whole;
  for (int lane = 0; lane < kWide; ++lane) {
    if (most[lane] == largest) best = std::min<int64_t>(best, where[lane]);
  }
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

  // The values behind the logits, up to whole vectors, do not matter. `scratch` has size() floats.
  void operator()(const float* z, int64_t* chosen, float* weights, float* scratch) const {
    const int64_t whole = wide_of(experts_);
    float *key = scratch, *probability = key + whole, *picked = probability + whole;
    const bool softmax = to_.score == Score::kSoftmax;
    if (softmax) softmax_of(z, probability, experts_);
    for (int64_t e = 0; e < experts_; ++e) {
      float value = z[e];
      if (!bias_.empty()) value = (softmax ? probability[e] : to_.elementwise(z[e])) + bias_[e];
      key[e] = finite(value);
    }
    std::fill(key + experts_, key + whole, kLowest);
    if (groups_.top < groups_.count) keep_groups(key, picked + wide_of(top_k_));
    for (int64_t k = 0; k < top_k_; ++k) chosen[k] = take_largest(key, whole);
    weigh(z, softmax ? probability : nullptr, chosen, weights, picked);
  }

  // The weights of given experts; of an id outside [0, E), which becomes -1, it is 0.
  void given(const float* z, const int64_t* ids, int64_t* chosen, float* weights, float* scratch) const {
    float *probability = scratch + wide_of(experts_), *picked = probability + wide_of(experts_);
    const bool softmax = to_.score == Score::kSoftmax;
    if (softmax) softmax_of(z, probability, experts_);
    for (int64_t k = 0; k < top_k_; ++k) chosen[k] = ids[k] < experts_ ? ids[k] : -1;
    weigh(z, softmax ? probability : nullptr, chosen, weights, picked);
  }

  int64_t size() const { return 2 * wide_of(experts_) + wide_of(top_k_) + wide_of(groups_.count); }

 private:
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  static float finite(float value) {
    constexpr float least = std::numeric_limits<float>::lowest();
    return value > least ? value : least;
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

  // `probability` is the softmax of all logits, where that is the score.
  void weigh(
      const float* z, const float* probability, const int64_t* chosen, float* weights, float* picked) const {
    const bool direct = probability && !to_.renormalize;
    int64_t known = 0;
    for (int64_t k = 0; k < top_k_; ++k) {
      if (chosen[k] >= 0) picked[known++] = direct ? probability[chosen[k]] : to_.start(z[chosen[k]]);
    }
    to_.finish(picked, known);
    for (int64_t k = 0; k < top_k_; ++k) weights[k] = chosen[k] >= 0 ? *picked++ : 0.0f;
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
