// Inner products of few rows of floats with many of 16 bits.

#include "cpu/common/few_rows.h"

#include "cpu/common/elements.h"

namespace molex {

namespace {

// Rows of b that are taken together with four of a: their sums fill half of the registers of AVX2.
constexpr int kColumns = 2, kRows = 4;

template <int ROWS, int COLUMNS, class Registers, class Element>
MOLEX_INLINE void inner_products(Registers registers,
                                 const float* a,
                                 int64_t lda,
                                 const Element* b,
                                 int64_t ldb,
                                 float* out,
                                 int64_t ldo,
                                 int64_t depth) {
  constexpr int kLanes = lanes_of<Element>(Registers{});
  Floats<kLanes> sums[ROWS][COLUMNS] = {};
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    Floats<kLanes> weights[COLUMNS];
    for (int n = 0; n < COLUMNS; ++n) weights[n] = load_elements<kLanes>(registers, b + n * ldb + k);
    for (int r = 0; r < ROWS; ++r) {
      const Floats<kLanes> values = load<kLanes>(a + r * lda + k);
      for (int n = 0; n < COLUMNS; ++n) sums[r][n] += values * weights[n];
    }
  }
  for (int n = 0; n < COLUMNS; ++n) {
    for (int r = 0; r < ROWS; ++r) {
      float total = sum_of_lanes(sums[r][n]);
      for (int64_t i = k; i < depth; ++i) total += a[r * lda + i] * static_cast<float>(b[n * ldb + i]);
      out[r * ldo + n] = total;
    }
  }
}

template <int COLUMNS, class Registers, class Element>
MOLEX_INLINE void all_rows(
    Registers registers, const Matrix& out, const Matrix& a, const Element* b, int64_t ldb, int64_t column) {
  const float* const from = static_cast<const float*>(a.data);
  float* const to = static_cast<float*>(out.data) + column;
  int64_t row = 0;
  const auto add = [&]<int ROWS>() MOLEX_LAMBDA_INLINE {
    for (; row + ROWS <= a.rows; row += ROWS) {
      inner_products<ROWS, COLUMNS>(registers,
                                    from + row * a.row_stride,
                                    a.row_stride,
                                    b,
                                    ldb,
                                    to + row * out.row_stride,
                                    out.row_stride,
                                    a.columns);
    }
  };
  add.template operator()<kRows>();
  add.template operator()<2>();
  add.template operator()<1>();
}

constexpr auto multiply_versions =
    versions([](auto registers, auto element, Matrix out, Matrix a, Matrix b) MOLEX_LAMBDA_INLINE {
      const auto* const from = static_cast<const decltype(element)*>(b.data);
      int64_t n = 0;
      for (; n + kColumns <= b.rows; n += kColumns) {
        all_rows<kColumns>(registers, out, a, from + n * b.row_stride, b.row_stride, n);
      }
      for (; n < b.rows; ++n) {
        all_rows<1>(registers, out, a, from + n * b.row_stride, b.row_stride, n);
      }
    });

}  // namespace

void multiply_few(const Matrix& out, const Matrix& a, const Matrix& b) {
  if (b.dtype == ScalarType::BFloat16) return multiply_versions(c10::BFloat16{}, out, a, b);
  multiply_versions(c10::Half{}, out, a, b);
}

}  // namespace molex
