// Numbers of fp16 and fp32 as two of bf16 each, for products on matrix tiles: x = high + low, exactly for
// fp16 and within 2^-17 of x for fp32. Of a product, high high + high low + low high are summed; what is left
// out is at most 2^-16 of it. The low part of an infinite x is NaN, and so is every sum with it.

#pragma once

#include "cpu/common/matmul.h"
#include "cpu/common/tiles.h"

namespace molex {

// Writes both terms of SIZE elements in rows of COLUMNS, `stride` apart.
template <class Machine, int64_t COLUMNS, int64_t SIZE, class Element>
MOLEX_INLINE void split_block(const Element* from, int64_t stride, uint16_t* high, uint16_t* low) {
  using V = typename Machine::V;
  using Bits = typename Bf16Of<Machine::kLanes>::Bits;
  constexpr int64_t kLanes = Machine::kLanes;
  for (int64_t i = 0; i < SIZE; i += 2 * kLanes) {
    V highs[2], lows[2];
    for (int64_t k = 0; k < 2; ++k) {
      const int64_t at = i + k * kLanes;
      const Element* const elements = from + at / COLUMNS * stride + at % COLUMNS;
      V x;
      if constexpr (std::is_same_v<Element, float>) {
        x = load<kLanes>(elements);
      } else {
        x = Machine::widen_halves(elements);
      }
      highs[k] = (V)(((Bits)x + 0x8000u) & 0xffff0000u);  // to the nearest
      lows[k] = x - highs[k];
    }
    Machine::narrow(highs[0], highs[1], high + i);
    Machine::narrow(lows[0], lows[1], low + i);
  }
}

// Writes the parts of ROWS x COLUMNS elements from (row, column) on of a matrix with any strides, row by row;
// zeros stand behind its end. Whole rows are read where they lie, others through a copy.
template <class Machine, int64_t ROWS, int64_t COLUMNS, class Element>
MOLEX_INLINE void split_as(const Matrix& m, int64_t row, int64_t column, uint16_t* high, uint16_t* low) {
  constexpr int64_t kSize = ROWS * COLUMNS;
  const int64_t height = std::min(m.rows - row, ROWS), width = std::min(m.columns - column, COLUMNS);
  const Element* const from =
      static_cast<const Element*>(m.data) + row * m.row_stride + column * m.column_stride;
  if (height == ROWS && width == COLUMNS && m.column_stride == 1) {
    return split_block<Machine, COLUMNS, kSize>(from, m.row_stride, high, low);
  }
  Element copy[kSize] = {};
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t c = 0; c < width; ++c) copy[r * COLUMNS + c] = from[r * m.row_stride + c * m.column_stride];
  }
  split_block<Machine, COLUMNS, kSize>(static_cast<const Element*>(copy), COLUMNS, high, low);
}

template <class Machine, int64_t ROWS, int64_t COLUMNS>
MOLEX_INLINE void split(const Matrix& m, int64_t row, int64_t column, uint16_t* high, uint16_t* low) {
  if (m.dtype == ScalarType::Float) {
    split_as<Machine, ROWS, COLUMNS, float>(m, row, column, high, low);
  } else {
    split_as<Machine, ROWS, COLUMNS, uint16_t>(m, row, column, high, low);
  }
}

}  // namespace molex
