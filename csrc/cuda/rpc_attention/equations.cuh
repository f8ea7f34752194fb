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

}  // namespace molex::rpc
