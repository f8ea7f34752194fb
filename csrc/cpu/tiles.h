// Products of small fp32 matrices, a tile of the result held in registers.

#pragma once

#include "rows.h"

namespace molex {

constexpr int kLanes = 8;

typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef float LoadedLanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// Rows [row, row + ROWS) and VECTORS * kLanes columns of c (+)= a b, held in registers.
template <int ROWS, int VECTORS>
MOLEX_INLINE void product_tile(const float* a,
                               int64_t lda,
                               const float* b,
                               int64_t ldb,
                               float* c,
                               int64_t ldc,
                               int64_t depth,
                               bool add) {
  Lanes sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      sum[r][v] = add ? Lanes(*reinterpret_cast<const LoadedLanes*>(c + r * ldc + v * kLanes)) : Lanes{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Lanes right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
      right[v] = *reinterpret_cast<const LoadedLanes*>(b + k * ldb + v * kLanes);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float left = a[r * lda + k];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<LoadedLanes*>(c + r * ldc + v * kLanes) = sum[r][v];
  }
}

template <int ROWS>
MOLEX_INLINE void product_rows(const float* a,
                               int64_t lda,
                               const float* b,
                               int64_t ldb,
                               float* c,
                               int64_t ldc,
                               int64_t columns,
                               int64_t depth,
                               bool add) {
  int64_t n = 0;
  for (; n + 3 * kLanes <= columns; n += 3 * kLanes) {
    product_tile<ROWS, 3>(a, lda, b + n, ldb, c + n, ldc, depth, add);
  }
  for (; n + kLanes <= columns; n += kLanes) {
    product_tile<ROWS, 1>(a, lda, b + n, ldb, c + n, ldc, depth, add);
  }
  for (; n < columns; ++n) {
    for (int r = 0; r < ROWS; ++r) {
      float sum = add ? c[r * ldc + n] : 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += a[r * lda + k] * b[k * ldb + n];
      c[r * ldc + n] = sum;
    }
  }
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns], row-major.
MOLEX_CLONES inline void product(const float* a,
                                 int64_t lda,
                                 const float* b,
                                 int64_t ldb,
                                 float* c,
                                 int64_t ldc,
                                 int64_t rows,
                                 int64_t columns,
                                 int64_t depth,
                                 bool add) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    product_rows<4>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, columns, depth, add);
  }
  for (; r < rows; ++r) {
    product_rows<1>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, columns, depth, add);
  }
}

}  // namespace molex
