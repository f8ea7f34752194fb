// Momentum on a CPU: what the forward and the backward pass share.
//
// Work is cut into spans: rows if there is a norm or a combine, else pieces of the flat tensor. A span's
// operands fit in the first-level cache. Sums over tokens go to a fixed number of chunks, which are added in
// order: the result does not depend on the number of threads.

#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cpu/common/rows.h"

namespace molex::momentum {

constexpr int64_t kSpan = 1024;   // elements of a span without norm and combine
constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

// In the order of `Coefficients` in the op's types.py.
struct Numbers {
  float mu, gamma, beta1, rest1, beta2, rest2, beta3, rest3, alpha, eps, keep, scale1, scale2;
  float variance_reduction;
};

Numbers numbers_of(const std::vector<double>& values,
                   const std::optional<Tensor>& mu,
                   const std::optional<Tensor>& gamma);

// What a span reads and writes. Unused pointers are null; an old state is null if it is 0.
struct Forward {
  const float *x, *f, *s0, *s1, *s2;
  float *y, *n0, *n1, *n2;
};

struct Backward {
  const float *dy, *f, *s0, *s1, *s2, *g0, *g1, *g2;
  float *df, *d0, *d1, *d2, *dmu, *dgamma;
};

// A rule over a span. `output` computes y = keep x - step alone, for the norm's backward pass. With
// `from_state`, f holds the new state (for rules with one state).
struct Rule {
  const char* name;
  void (*forward)(const Forward& a, int64_t count, const Numbers& c);
  void (*output)(const Forward& a, int64_t count, const Numbers& c, bool from_state);
  void (*backward)(const Backward& b, int64_t count, const Numbers& c, bool from_state);
};

const Rule& rule_of(const std::string& name);

}  // namespace molex::momentum
