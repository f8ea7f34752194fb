// The experts' MLP on matrix tiles, forward, in bf16.

#pragma once

#include <optional>

#include "cpu/dispatch/activation.h"
#include "cpu/dispatch/experts.h"

namespace molex {

struct Layer {
  const Tensor& x;
  const Tensor& w_up;
  const Tensor& w_down;
  const std::optional<Tensor>& b_up;
  const std::optional<Tensor>& b_down;
  Activation activation;
};

// Writes the experts' outputs to `packed` [R, D], of bf16 or fp32, and the pre-activations to `kept` [R, H],
// of bf16, if it is given. The activation is taken of fp32 sums.
void experts_on_tiles(const Layer& layer, const Assignments& plan, const Matrix& packed, const Target& kept);

}  // namespace molex
