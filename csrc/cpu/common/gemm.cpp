// Matrix products held in registers.

#include "cpu/common/gemm.h"

#include <algorithm>

#include "cpu/common/vector.h"

namespace molex {

namespace {

// A sum over `depth` is cut into blocks of this many terms, and the blocks' sums are added: one long running
// sum would lose digits.
constexpr int64_t kAccumulationBlock = 128;

// Computes ROWS rows and VECTORS * LANES columns of c (+)= a b. TRANSPOSED: a is stored [depth, rows].
template <int LANES, int ROWS, int VECTORS, bool TRANSPOSED>
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
    Floats<LANES> b_values[VECTORS];
    for (int v = 0; v < VECTORS; ++v) b_values[v] = load<LANES>(b + k * ldb + v * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const float a_value = TRANSPOSED ? a[k * lda + r] : a[r * lda + k];
      for (int v = 0; v < VECTORS; ++v) sum[r][v] += a_value * b_values[v];
    }
  }
  // The old value of c is added last, so that the terms are not rounded at its magnitude.
  for (int r = 0; r < ROWS; ++r) {
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c + r * ldc + v * LANES;
      store(to, add ? load<LANES>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

template <int LANES, int ROWS, int MOST, bool TRANSPOSED>
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
  const auto add_tiles = [&]<int VECTORS>() MOLEX_LAMBDA_INLINE {
    for (; n + VECTORS * LANES <= columns; n += VECTORS * LANES) {
      product_tile<LANES, ROWS, VECTORS, TRANSPOSED>(a, lda, b + n, ldb, c + n, ldc, depth, add);
    }
  };
  if constexpr (MOST >= 4) add_tiles.template operator()<4>();
  if constexpr (MOST >= 3) add_tiles.template operator()<3>();
  if constexpr (MOST >= 2) add_tiles.template operator()<2>();
  add_tiles.template operator()<1>();
  if (n == columns) return;
  if constexpr (LANES > 4) {
    product_rows<LANES / 2, ROWS, 1, TRANSPOSED>(a, lda, b + n, ldb, c + n, ldc, columns - n, depth, add);
  } else {
    for (; n < columns; ++n) {
      for (int r = 0; r < ROWS; ++r) {
        float sum = 0.0f;
        for (int64_t k = 0; k < depth; ++k)
          sum += (TRANSPOSED ? a[k * lda + r] : a[r * lda + k]) * b[k * ldb + n];
        c[r * ldc + n] = add ? c[r * ldc + n] + sum : sum;
      }
    }
  }
}

template <int LANES, bool MANY_REGISTERS, bool TRANSPOSED>
MOLEX_INLINE void product_of(const Gemm& g) {
  constexpr int kMost = MANY_REGISTERS ? 4 : 2;
  const int64_t row_stride = TRANSPOSED ? 1 : g.lda, depth_stride = TRANSPOSED ? g.lda : 1;
  int64_t k = 0;
  do {
    const int64_t part = std::min(kAccumulationBlock, g.depth - k);
    const bool more = g.add || k > 0;
    int64_t r = 0;
    const auto add_tiles = [&]<int ROWS>() MOLEX_LAMBDA_INLINE {
      for (; r + ROWS <= g.rows; r += ROWS) {
        product_rows<LANES, ROWS, kMost, TRANSPOSED>(g.a + r * row_stride + k * depth_stride,
                                                     g.lda,
                                                     g.b + k * g.ldb,
                                                     g.ldb,
                                                     g.c + r * g.ldc,
                                                     g.ldc,
                                                     g.columns,
                                                     part,
                                                     more);
      }
    };
    add_tiles.template operator()<6>();
    add_tiles.template operator()<4>();
    add_tiles.template operator()<1>();
    k += part;
  } while (k < g.depth);
}

// Computes ROWS x COLUMNS inner products of rows of a with rows of b, each in LANES partial sums.
template <int LANES, int ROWS, int COLUMNS>
MOLEX_INLINE void inner_tile(const float* a,
                             int64_t lda,
                             const float* b,
                             int64_t ldb,
                             float* c,
                             int64_t ldc,
                             int64_t depth,
                             bool add) {
  Floats<LANES> sum[ROWS][COLUMNS] = {};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    Floats<LANES> b_values[COLUMNS];
    for (int n = 0; n < COLUMNS; ++n) b_values[n] = load<LANES>(b + n * ldb + k);
    for (int r = 0; r < ROWS; ++r) {
      const Floats<LANES> a_values = load<LANES>(a + r * lda + k);
      for (int n = 0; n < COLUMNS; ++n) sum[r][n] += a_values * b_values[n];
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int n = 0; n < COLUMNS; ++n) {
      float total = sum_of_lanes(sum[r][n]);
      for (int64_t i = k; i < depth; ++i) total += a[r * lda + i] * b[n * ldb + i];
      c[r * ldc + n] = add ? c[r * ldc + n] + total : total;
    }
  }
}

template <int LANES, int ROWS, int MOST>
MOLEX_INLINE void inner_rows(const float* a,
                             int64_t lda,
                             const float* b,
                             int64_t ldb,
                             float* c,
                             int64_t ldc,
                             int64_t columns,
                             int64_t depth,
                             bool add) {
  int64_t n = 0;
  for (; n + MOST <= columns; n += MOST) {
    inner_tile<LANES, ROWS, MOST>(a, lda, b + n * ldb, ldb, c + n, ldc, depth, add);
  }
  for (; n < columns; ++n) inner_tile<LANES, ROWS, 1>(a, lda, b + n * ldb, ldb, c + n, ldc, depth, add);
}

template <int LANES, bool MANY_REGISTERS>
MOLEX_INLINE void inner_of(const Gemm& g) {
  constexpr int kMost = MANY_REGISTERS ? 4 : 2;
  int64_t r = 0;
  const auto add_tiles = [&]<int ROWS>() MOLEX_LAMBDA_INLINE {
    for (; r + ROWS <= g.rows; r += ROWS) {
      inner_rows<LANES, ROWS, kMost>(
          g.a + r * g.lda, g.lda, g.b, g.ldb, g.c + r * g.ldc, g.ldc, g.columns, g.depth, g.add);
    }
  };
  add_tiles.template operator()<4>();
  add_tiles.template operator()<1>();
}

template <bool TRANSPOSED>
constexpr auto product_versions = versions([](auto registers, const Gemm& g) MOLEX_LAMBDA_INLINE {
  product_of<registers.kLanes, registers.kMany, TRANSPOSED>(g);
});

constexpr auto inner_versions = versions([](auto registers, const Gemm& g) MOLEX_LAMBDA_INLINE {
  inner_of<registers.kLanes, registers.kMany>(g);
});

}  // namespace

void product(const Gemm& g) { product_versions<false>(g); }

void product_transposed(const Gemm& g) { product_versions<true>(g); }

void product_inner(const Gemm& g) { inner_versions(g); }

}  // namespace molex
