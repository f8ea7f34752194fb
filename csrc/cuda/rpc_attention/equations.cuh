// The element-wise equations of an iteration.

#pragma once

#include "cuda/rpc_attention/parameters.cuh"

namespace molex::rpc {

// The scale of scores in powers of 2. A scale of 0 becomes the smallest number, because masked scores are
// -infinity.
MOLEX_DEVICE float score_scale(const Problem& p) {
  constexpr float kLog2e = 1.4426950408889634f, kSmallest = 0x1p-126f;
  const float scale2 = p.scale * kLog2e;
  return scale2 > -kSmallest && scale2 < kSmallest ? kSmallest : scale2;
}

// One iteration's S, K~ = k - S - u, and w = u + k - S, from which u' = w - L'.
struct Split {
  float sparse, key, w;
};

// S = a - sign(a) T outside (-T, T), else 0; NaN if a or T is NaN.
MOLEX_DEVICE Split soft_threshold(float k, float low_rank, float u, float bound) {
  const float a = k - low_rank + u;
  const float sparse = device::absolute(a) < bound ? 0.0f : a - device::with_sign(bound, a);
  return {sparse, k - sparse - u, u + k - sparse};
}

// The derivative of S: m = 1 outside (-T, T), and sign(a), in one byte for the backward pass.
constexpr int8_t kInside = 2;
MOLEX_DEVICE int8_t side(float a, float bound) {
  if (device::absolute(a) < bound) return kInside;
  return a > 0.0f ? 1 : (a < 0.0f ? -1 : 0);
}

// What an iteration leaves of the gradients of an element, from x = gK~ and `carried`: gu, or of the last
// iteration, which has no gu, -gS.
//   ga = gS - gu - x outside the threshold, else 0 ;  gk += gu + x + ga ;  gu' = gu - x + ga ;  gL' = -ga
// `sum` is what gk + gu gains: gu contains -x of the later iteration, which gk would otherwise have to add
// and subtract again. Outside the threshold ga contains -x; the sums are written so that it is never added
// and subtracted.
struct StepBack {
  float threshold, sum, dual, next;  // ga, the gain, gu', and G' = gL' - gu'
};
MOLEX_DEVICE StepBack step_back(float x, float carried, bool outside, bool is_first, bool is_last) {
  const float dual = is_last ? 0.0f : carried, more = is_last ? -carried : 0.0f;  // gu, gS
  StepBack step;
  step.threshold = outside ? -carried - x : 0.0f;
  const float gain = outside ? device::multiply_add(-2.0f, x, more - carried) : dual;
  step.sum = is_first ? (outside ? -carried : x) : gain;
  step.dual = device::multiply_add(outside ? -2.0f : -1.0f, x, outside ? more : dual);
  step.next = -step.threshold - step.dual;
  return step;
}

}  // namespace molex::rpc
