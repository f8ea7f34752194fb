// The momentum rules, element by element.

#include "cpu/momentum/rules.h"

#include <algorithm>
#include <cmath>
#include <iterator>

namespace molex::momentum {

namespace {

enum class Kind { kLinear, kNesterov, kSignum, kAdam, kAdEMAMix };

struct Step {
  float step, n0, n1, n2;
};

constexpr int num_states(Kind kind) { return kind == Kind::kAdEMAMix ? 3 : kind == Kind::kAdam ? 2 : 1; }

// FROM_STATE: f holds the new state (for rules with one state).
template <Kind KIND, bool FROM_STATE>
MOLEX_INLINE Step step_at(float f, float s0, float s1, float s2, const Numbers& c) {
  if constexpr (KIND == Kind::kAdam || KIND == Kind::kAdEMAMix) {
    const float n0 = c.beta1 * s0 + c.rest1 * f;
    const float n1 = c.beta2 * s1 + c.rest2 * f * f;
    if constexpr (KIND == Kind::kAdam) return {c.gamma * n0 / std::sqrt(n1 + c.eps), n0, n1, 0.0f};
    const float n2 = c.beta3 * s2 + c.rest3 * f;
    return {c.gamma * (c.scale1 * n0 + c.alpha * n2) / (std::sqrt(c.scale2 * n1) + c.eps), n0, n1, n2};
  } else {
    const float sign = static_cast<float>(f > 0.0f) - static_cast<float>(f < 0.0f);
    const float push =
        FROM_STATE ? f - c.mu * s0 : c.gamma * (KIND == Kind::kSignum ? (f == f ? sign : f) : f);
    const float n0 = FROM_STATE ? f : c.mu * s0 + push;
    return {KIND == Kind::kNesterov ? c.mu * n0 + push : n0, n0, 0.0f, 0.0f};
  }
}

template <Kind KIND, bool HAS_STATE>
MOLEX_INLINE void forward_span(const Forward& a, int64_t count, Numbers c) {
  const float *x = a.x, *f = a.f, *s0 = a.s0, *s1 = a.s1, *s2 = a.s2;
  float *y = a.y, *n0 = a.n0, *n1 = a.n1, *n2 = a.n2;
  constexpr int kStates = num_states(KIND);
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Step made = step_at<KIND, false>(f[i],
                                           HAS_STATE ? s0[i] : 0.0f,
                                           HAS_STATE && kStates > 1 ? s1[i] : 0.0f,
                                           HAS_STATE && kStates > 2 ? s2[i] : 0.0f,
                                           c);
    y[i] = c.keep * x[i] - made.step;
    n0[i] = made.n0;
    if constexpr (kStates > 1) n1[i] = made.n1;
    if constexpr (kStates > 2) n2[i] = made.n2;
  }
}

template <Kind KIND, bool HAS_STATE, bool FROM_STATE>
MOLEX_INLINE void output_span(const Forward& a, int64_t count, Numbers c) {
  const float *x = a.x, *f = a.f, *s0 = a.s0, *s1 = a.s1, *s2 = a.s2;
  float* y = a.y;
  constexpr int kStates = num_states(KIND);
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Step made = step_at<KIND, FROM_STATE>(f[i],
                                                HAS_STATE ? s0[i] : 0.0f,
                                                HAS_STATE && kStates > 1 ? s1[i] : 0.0f,
                                                HAS_STATE && kStates > 2 ? s2[i] : 0.0f,
                                                c);
    y[i] = c.keep * x[i] - made.step;
  }
}

// HAS_FORWARD: the operands of the step are given. Without them only df and d0 of a linear rule can be
// computed. HAS_NUMBERS: the gradients of mu and gamma are wanted, element by element.
template <Kind KIND, bool HAS_STATE, bool HAS_FORWARD, bool FROM_STATE, bool HAS_NUMBERS>
MOLEX_INLINE void backward_span(const Backward& b, int64_t count, Numbers c) {
  const float *dy = b.dy, *f = b.f, *s0 = b.s0, *s1 = b.s1, *s2 = b.s2;
  const float *g0 = b.g0, *g1 = b.g1, *g2 = b.g2;
  float *df = b.df, *d0 = b.d0, *d1 = b.d1, *d2 = b.d2;
  float *dmu = b.dmu, *dgamma = b.dgamma;
  constexpr int kStates = num_states(KIND);
  MOLEX_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const float d = -dy[i];  // the gradient of the step
    const float fi = HAS_FORWARD ? f[i] : 0.0f;
    const float s = HAS_FORWARD && HAS_STATE ? s0[i] : 0.0f;
    Step made{};
    if constexpr (HAS_FORWARD) {
      made = step_at<KIND, FROM_STATE>(
          fi, s, HAS_STATE && kStates > 1 ? s1[i] : 0.0f, HAS_STATE && kStates > 2 ? s2[i] : 0.0f, c);
    }
    if constexpr (KIND == Kind::kAdam) {
      const float inverse = 1.0f / std::sqrt(made.n1 + c.eps);
      const float dn0 = d * c.gamma * inverse;
      const float t0 = g0[i] + dn0;
      const float t1 = g1[i] - 0.5f * dn0 * made.n0 * inverse * inverse;
      df[i] = c.rest1 * t0 + 2.0f * c.rest2 * fi * t1;
      d0[i] = c.beta1 * t0;
      d1[i] = c.beta2 * t1;
      if constexpr (HAS_NUMBERS) dgamma[i] = d * made.n0 * inverse;
    } else if constexpr (KIND == Kind::kAdEMAMix) {
      const float root = std::sqrt(c.scale2 * made.n1);
      const float inverse = 1.0f / (root + c.eps);
      const float dmixed = d * c.gamma * inverse;
      const float mixed = c.scale1 * made.n0 + c.alpha * made.n2;
      const float slope = made.n1 > 0.0f ? 0.5f * c.scale2 / root : 0.0f;
      const float t0 = g0[i] + dmixed * c.scale1;
      const float t1 = g1[i] - dmixed * mixed * inverse * slope;
      const float t2 = g2[i] + dmixed * c.alpha;
      df[i] = c.rest1 * t0 + 2.0f * c.rest2 * fi * t1 + c.rest3 * t2;
      d0[i] = c.beta1 * t0;
      d1[i] = c.beta2 * t1;
      d2[i] = c.beta3 * t2;
      if constexpr (HAS_NUMBERS) dgamma[i] = d * mixed * inverse;
    } else {
      const bool nesterov = KIND == Kind::kNesterov;
      const float t0 = g0[i] + (nesterov ? c.mu * d : d);
      const float t = nesterov ? t0 + d : t0;
      df[i] = KIND == Kind::kSignum ? 0.0f : c.gamma * t;
      d0[i] = c.mu * t0;
      if constexpr (HAS_NUMBERS) {
        dmu[i] = t0 * s + (nesterov ? d * made.n0 : 0.0f);
        dgamma[i] = t * fi;
      }
    }
  }
}

template <Kind KIND>
MOLEX_INLINE void forward_of(const Forward& a, int64_t count, const Numbers& c) {
  a.s0 ? forward_span<KIND, true>(a, count, c) : forward_span<KIND, false>(a, count, c);
}

template <Kind KIND, bool FROM_STATE>
MOLEX_INLINE void output_from(const Forward& a, int64_t count, const Numbers& c) {
  a.s0 ? output_span<KIND, true, FROM_STATE>(a, count, c) : output_span<KIND, false, FROM_STATE>(a, count, c);
}

template <Kind KIND>
MOLEX_INLINE void output_of(const Forward& a, int64_t count, const Numbers& c, bool from_state) {
  if constexpr (num_states(KIND) == 1) {
    if (from_state) return output_from<KIND, true>(a, count, c);
  }
  output_from<KIND, false>(a, count, c);
}

template <Kind KIND, bool FROM_STATE>
MOLEX_INLINE void backward_from(const Backward& b, int64_t count, const Numbers& c) {
  if (b.dmu) {
    b.s0 ? backward_span<KIND, true, true, FROM_STATE, true>(b, count, c)
         : backward_span<KIND, false, true, FROM_STATE, true>(b, count, c);
  } else {
    b.s0 ? backward_span<KIND, true, true, FROM_STATE, false>(b, count, c)
         : backward_span<KIND, false, true, FROM_STATE, false>(b, count, c);
  }
}

template <Kind KIND>
MOLEX_INLINE void backward_of(const Backward& b, int64_t count, const Numbers& c, bool from_state) {
  if constexpr (num_states(KIND) == 1) {
    if (!b.f) return backward_span<KIND, false, false, false, false>(b, count, c);
    if (from_state) return backward_from<KIND, true>(b, count, c);
  }
  backward_from<KIND, false>(b, count, c);
}

template <Kind KIND>
constexpr Rule rule(const char* name) {
  return {name,
          versions([](auto, const Forward& a, int64_t count, const Numbers& c)
                       MOLEX_LAMBDA_INLINE { forward_of<KIND>(a, count, c); }),
          versions([](auto, const Forward& a, int64_t count, const Numbers& c, bool from_state)
                       MOLEX_LAMBDA_INLINE { output_of<KIND>(a, count, c, from_state); }),
          versions([](auto, const Backward& b, int64_t count, const Numbers& c, bool from_state)
                       MOLEX_LAMBDA_INLINE { backward_of<KIND>(b, count, c, from_state); })};
}

constexpr Rule kRules[] = {rule<Kind::kLinear>("linear"),
                           rule<Kind::kNesterov>("nesterov"),
                           rule<Kind::kSignum>("signum"),
                           rule<Kind::kAdam>("adam"),
                           rule<Kind::kAdam>("mars"),  // of an f that has been corrected
                           rule<Kind::kAdEMAMix>("ademamix")};

}  // namespace

const Rule& rule_of(const std::string& name) {
  const auto found =
      std::find_if(std::begin(kRules), std::end(kRules), [&](const Rule& rule) { return name == rule.name; });
  STD_TORCH_CHECK(found != std::end(kRules), "kind: unknown rule ", name);
  return *found;
}

Numbers numbers_of(const std::vector<double>& values,
                   const std::optional<Tensor>& mu,
                   const std::optional<Tensor>& gamma) {
  STD_TORCH_CHECK(
      values.size() == sizeof(Numbers) / sizeof(float), "numbers: expected 14, got ", values.size());
  Numbers numbers;
  float* fields = reinterpret_cast<float*>(&numbers);
  for (size_t i = 0; i < values.size(); ++i) fields[i] = static_cast<float>(values[i]);
  if (mu) numbers.mu = scalar_of(*mu);
  if (gamma) numbers.gamma = scalar_of(*gamma);
  return numbers;
}

}  // namespace molex::momentum
