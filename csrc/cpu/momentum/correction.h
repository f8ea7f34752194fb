// The experts' output as the rule Mars takes it: corrected, and clipped by its norm over a sample.
//
//   c = f + weight (f - f_prev);  c^ = c / max(1, ||c||)
//
// The norm comes from a pass of its own; the passes of the update compute a row of c^ from what they read.

#pragma once

#include <optional>
#include <vector>

#include "cpu/common/rows.h"

namespace molex::momentum {

class Correction {
 public:
  // f and f_prev are [T, D], where f_prev is 0 if there is none; a sample is `sample_tokens` rows in turn.
  Correction(const Tensor& f, const std::optional<Tensor>& f_prev, float weight, int64_t sample_tokens);

  // Returns the sum of squares over each sample of c, [samples] in fp32, and takes them. The order of the sum
  // depends on the shape alone.
  Tensor sum_squares(const Tensor& like);

  // Takes what `sum_squares` gave.
  void take_squares(const Tensor& squares);

  // Writes row `row` of c^ to `to`, of that row of f, which may be `to`. Returns `to`.
  const float* clipped(float* to, const float* f, int64_t row, float* scratch) const;

  // The gradient of f from that of c^, g; `products` has the sum of c^ times g over each row. `df` may be g.
  void backward(const float* g, const std::vector<float>& products, Target df) const;

 private:
  const float* corrected(float* to, const float* f, int64_t row, float* scratch) const;

  Tensor f_;
  std::optional<Tensor> f_prev_;
  Source from_f_, from_prev_;
  float now_, before_;  // what f and f_prev are multiplied by
  int64_t width_, samples_, sample_tokens_;
  std::vector<float> squares_, inverse_norms_;  // by sample
};

}  // namespace molex::momentum
