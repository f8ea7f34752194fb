// Products of matrices on matrix tiles, on one thread.

#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include "cpu/common/tile_blocks.h"

namespace molex {

// What a thread needs for products; it lives as long as the thread's task, in which tiles are configured.
class TileProduct {
 public:
  // out [M, N] = a [M, K] b [K, N], summed in fp32, plus the bias of each column. a and b are both bf16, or
  // each fp16 or fp32, which tile_terms.h has in two terms of bf16, and have any strides; out has contiguous
  // rows, of any of the three, to which sums are rounded once.
  void operator()(const Matrix& out, const Matrix& a, const Matrix& b, const float* bias = nullptr);

 private:
  void without_terms(const Matrix& out, const Matrix& a, const Matrix& b, const float* bias);

  std::optional<TileScope> scope_{std::in_place};
  std::optional<Arena> arena_;
  int64_t bytes_ = 0;
};

// A thread's products for tensors of this dtype, on tiles or by the BLAS.
class Multiplier {
 public:
  explicit Multiplier(ScalarType dtype) {
    if (multiplies_on_tiles(dtype)) tiles_.emplace();
  }

  void operator()(const Matrix& out, const Matrix& a, const Matrix& b) {
    tiles_ ? (*tiles_)(out, a, b) : multiply(out, a, b);
  }

 private:
  std::optional<TileProduct> tiles_;
};

}  // namespace molex
