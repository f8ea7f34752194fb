// Matrix products held in registers.

#pragma once

#include "vector.h"

namespace molex {

// Rows [0, ROWS) and VECTORS * LANES columns of c (+)= a b. TURNED: a is given as its transpose.
template <int LANES, int ROWS, int VECTORS, bool TURNED>
MOLEX_INLINE void product_tile(const float* a,
                               int64_t lda,
                               const float* b,
                               int64_t ldb,
                               float* c,
                               int64_t ldc,
                               int64_t depth,
                               bool add) {
  Floats<LANES> sum[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats<LANES> right[VECTORS];
    for (int v = 0; v < VECTORS; ++v) right[v] = load<LANES>(b + k * ldb + v * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const float left = TURNED ? a[k * lda + r] : a[r * lda + k];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += left * right[v];
    }
  }
  // What is there comes last: the terms are not rounded as its size has it.
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c + r * ldc + v * LANES;
      store(to, add ? load<LANES>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int LANES, int ROWS, int MOST, bool TURNED>
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
  const auto take = [&]<int VECTORS>() MOLEX_LAMBDA_INLINE {
    for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES) {
      product_tile<LANES, ROWS, VECTORS, TURNED>(a, lda, b + n, ldb, c + n, ldc, depth, add);
    }
  };
  if constexpr (MOST >= 4) take.template operator()<4>();
  if constexpr (MOST >= 3) take.template operator()<3>();
  if constexpr (MOST >= 2) take.template operator()<2>();
  take.template operator()<1>();
  for (; n < columns; ++n) {
    for (int r = 0; r < ROWS; ++r) {
      float sum = 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += (TURNED ? a[k * lda + r] : a[r * lda + k]) * b[k * ldb + n];
      c[r * ldc + n] = add ? c[r * ldc + n] + sum : sum;
    }
  }
}

template <int LANES, bool MANY, bool TURNED>
MOLEX_INLINE void product_of(const float* a,
                             int64_t lda,
                             const float* b,
                             int64_t ldb,
                             float* c,
                             int64_t ldc,
                             int64_t rows,
                             int64_t columns,
                             int64_t depth,
                             bool add) {
  constexpr int kMost = MANY ? 4 : 2;
  const int64_t step = TURNED ? 1 : lda;
  int64_t r = 0;
  const auto take = [&]<int ROWS>() MOLEX_LAMBDA_INLINE {
    for (; r + ROWS <= rows; r += ROWS) {
      product_rows<LANES, ROWS, kMost, TURNED>(
          a + r * step, lda, b, ldb, c + r * ldc, ldc, columns, depth, add);
    }
  };
  take.template operator()<6>();
  take.template operator()<4>();
  take.template operator()<1>();
}

// c [rows, columns] (+)= a b with a [rows, depth] and b [depth, columns], all row-major with rows `ld`
// apart. `product_turned` takes a [depth, rows] and multiplies with its transpose.
using Product = void (*const)(const float* a,
                              int64_t lda,
                              const float* b,
                              int64_t ldb,
                              float* c,
                              int64_t ldc,
                              int64_t rows,
                              int64_t columns,
                              int64_t depth,
                              bool add);
extern Product product, product_turned;

}  // namespace molex
