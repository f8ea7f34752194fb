// Products of few rows with a matrix of 16 bits, on one thread.

#pragma once

#include "cpu/common/matmul.h"

namespace molex {

constexpr int64_t kFewRows = 64;  // at most

// Whether it is faster to convert numbers of 16 bits for every four rows than to write them as floats: a long
// sum pays for the addition of its lanes.
inline bool are_few(int64_t rows, int64_t depth) { return rows <= kFewRows && 20 * rows <= depth; }

// out [M, N] = a [M, K] b^T, with a and out in fp32 and b [N, K] in bf16 or fp16, which is read as it lies,
// and only from memory once. Rows of all three are contiguous.
void multiply_few(const Matrix& out, const Matrix& a, const Matrix& b);

}  // namespace molex
