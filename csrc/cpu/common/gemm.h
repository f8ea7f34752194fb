// Products of matrices of floats in memory, on one thread.

#pragma once

#include <cstdint>

namespace molex {

// The operands of c [rows, columns] (+)= a b, with a [rows, depth] and b [depth, columns]. All are row-major,
// and `lda`, `ldb` and `ldc` are the distances between rows.
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

// c (+)= a b.
void product(const Gemm& g);
// c (+)= a^T b: a is stored [depth, rows].
void product_transposed(const Gemm& g);
// c (+)= a b^T: b is stored [columns, depth].
void product_inner(const Gemm& g);

}  // namespace molex
