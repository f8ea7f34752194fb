// Products of matrices of floats in memory, on one thread.

#pragma once

#include <cstdint>

namespace molex {

// c [rows, columns] (+)= a b with a [rows, depth] and b [depth, columns], all row-major with rows `ld` apart.
struct Gemm {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t rows, columns, depth;
  bool add;
};

void product(const Gemm& g);
// a is [depth, rows], and its transpose is multiplied.
void product_turned(const Gemm& g);
// b is [columns, depth], and is multiplied with its transpose.
void product_inner(const Gemm& g);

}  // namespace molex
