// Products of bf16 matrices on matrix tiles, on one thread.

#pragma once

#include <cstdint>
#include <optional>

#include "cpu/common/tile_blocks.h"

namespace molex {

// What a thread needs for products; it lives as long as the thread's task, in which tiles are configured.
class TileProduct {
 public:
  // out [M, N] = a [M, K] b [K, N], summed in fp32, plus the bias of each column. a and b have any strides,
  // out has contiguous rows, of bf16, to which sums are rounded once, or of fp32.
  void operator()(const Matrix& out, const Matrix& a, const Matrix& b, const float* bias = nullptr);

 private:
  TileScope scope_;
  std::optional<Arena> arena_;
  int64_t bytes_ = 0;
};

}  // namespace molex
