// Dropout's random words, the same as _philox.py draws.

#pragma once

#include <cmath>

#include "cpu/common/rows.h"

namespace molex {

// The first word of Philox 4x32-7 at a position.
MOLEX_INLINE uint32_t philox(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{c0} * 0xD2511F53u, b = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

struct Dropout {
  uint64_t seed = 0, threshold = 0;
  float scale = 1.0f;
  bool on = false;

  Dropout(const std::optional<Tensor>& number, double p) {
    if (!number) return;
    seed = static_cast<uint64_t>(*number->const_data_ptr<int64_t>());
    threshold = static_cast<uint64_t>(std::llround(p * 4294967296.0));
    scale = static_cast<float>(1.0 / (1.0 - p));
    on = true;
  }

  // Returns the scaled element at a position, or 0 (whatever the element is) if it is dropped.
  MOLEX_INLINE float operator()(float x, uint64_t position) const {
    return philox(seed, position) >= threshold ? x * scale : 0.0f;
  }
};

inline constexpr auto drop =
    versions([](auto, const Dropout& dropout, float* x, int64_t first, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) x[i] = dropout(x[i], static_cast<uint64_t>(first + i));
    });

}  // namespace molex
