// Operands as matrix tiles. A tile of the left operand is 16 rows of 32 elements, one of the right operand 16
// pairs of elements for 16 columns; tiles of one row or column of tiles follow each other in the order in
// which they are summed. Behind the end of a matrix stand zeros. Where TERMS is 2, matrices are fp16 or fp32,
// and behind each tile of high parts stands that of the low ones.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/common/matmul.h"
#include "cpu/common/tile_terms.h"
#include "cpu/common/tiles.h"

namespace molex {

constexpr int64_t kSide = 16;             // rows of a tile
constexpr int64_t kDeep = 32;             // terms of a tile's row
constexpr int64_t kTile = kSide * kDeep;  // bf16 of a tile
constexpr int64_t kArea = kSide * kSide;  // floats of a tile of sums

// Tiles of terms that are multiplied at a time: two rows of them stay in the first-level cache.
constexpr int64_t kBlock = 16;

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline const uint16_t* element(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const uint16_t*>(m.data) + row * m.row_stride + column * m.column_stride;
}

// Number (i, j) of the tile is the pair of elements (row + 2 i, column + j) and (row + 2 i + 1, column + j)
// of a matrix whose rows are contiguous.
MOLEX_INLINE void pair_rows(const Matrix& m, int64_t row, int64_t column, uint32_t* to) {
  const int64_t height = std::min(m.rows - row, kDeep), width = std::min(m.columns - column, kSide);
  if (height < kDeep || width < kSide) std::memset(to, 0, kTile * sizeof(uint16_t));
  for (int64_t r = 0; r < height; r += 2, to += kSide) {
    const uint16_t* const even = element(m, row + r, column);
    const uint16_t* const odd = even + m.row_stride;
    if (r + 1 == height) {
      for (int64_t i = 0; i < width; ++i) to[i] = even[i];
    } else if (width == kSide) {
      for (int64_t i = 0; i < kSide; ++i) to[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
    }
  }
}

// Writes elements [row, row + 16) x [column, column + 32) of a matrix with any strides as a tile of rows.
template <class Machine>
MOLEX_INLINE void tile_of_rows(const Matrix& m, int64_t row, int64_t column, uint16_t* to) {
  if (m.column_stride != 1 && m.row_stride == 1) {
    alignas(64) uint32_t made[kArea];
    pair_rows(m.transposed(), column, row, made);
    return Machine::turn_16(made, kSide, to, kSide);
  }
  const int64_t height = std::min(m.rows - row, kSide), width = std::min(m.columns - column, kDeep);
  if (height < kSide || width < kDeep) std::memset(to, 0, kTile * sizeof(uint16_t));
  for (int64_t r = 0; r < height; ++r, to += kDeep) {
    const uint16_t* const from = element(m, row + r, column);
    if (m.column_stride == 1 && width == kDeep) {
      std::memcpy(to, from, kDeep * sizeof(uint16_t));
    } else if (m.column_stride == 1) {
      std::memcpy(to, from, width * sizeof(uint16_t));
    } else {
      for (int64_t c = 0; c < width; ++c) to[c] = from[c * m.column_stride];
    }
  }
}

// Writes elements [row, row + 32) x [column, column + 16) of a matrix with any strides as a tile of pairs.
template <class Machine>
MOLEX_INLINE void tile_of_pairs(const Matrix& m, int64_t row, int64_t column, uint16_t* to) {
  if (m.column_stride == 1) return pair_rows(m, row, column, reinterpret_cast<uint32_t*>(to));
  const bool is_whole = m.rows - row >= kDeep && m.columns - column >= kSide;
  if (m.row_stride == 1 && m.column_stride % 2 == 0 && is_whole) {
    return Machine::turn_16(element(m, row, column), m.column_stride / 2, to, kSide);
  }
  alignas(64) uint16_t made[kTile];
  tile_of_rows<Machine>(m.transposed(), column, row, made);
  Machine::turn_16(made, kSide, to, kSide);
}

// The tiles of both parts of two terms, one behind the other.
template <class Machine, int TERMS>
MOLEX_INLINE void tiles_of_rows(const Matrix& m, int64_t row, int64_t column, uint16_t* to) {
  if constexpr (TERMS == 1) {
    tile_of_rows<Machine>(m, row, column, to);
  } else if (m.column_stride != 1 && m.row_stride == 1) {
    alignas(64) uint16_t parts[2][kTile];
    split<Machine, kDeep, kSide>(m.transposed(), column, row, parts[0], parts[1]);
    for (auto& part : parts) {
      const Matrix whole{part, ScalarType::BFloat16, kDeep, kSide, kSide};
      tile_of_rows<Machine>(whole.transposed(), 0, 0, to);
      to += kTile;
    }
  } else {
    split<Machine, kSide, kDeep>(m, row, column, to, to + kTile);
  }
}

template <class Machine, int TERMS>
MOLEX_INLINE void tiles_of_pairs(const Matrix& m, int64_t row, int64_t column, uint16_t* to) {
  if constexpr (TERMS == 1) return tile_of_pairs<Machine>(m, row, column, to);
  alignas(64) uint16_t parts[2][kTile];
  if (m.column_stride == 1) {
    split<Machine, kDeep, kSide>(m, row, column, parts[0], parts[1]);
    for (auto& part : parts) {
      const Matrix whole{part, ScalarType::BFloat16, kDeep, kSide, kSide};
      tile_of_pairs<Machine>(whole, 0, 0, to);
      to += kTile;
    }
  } else {
    split<Machine, kSide, kDeep>(m.transposed(), column, row, parts[0], parts[1]);
    for (auto& part : parts) {
      Machine::turn_16(part, kSide, to, kSide);
      to += kTile;
    }
  }
}

// Writes elements [row, row + 32) x [column, column + 32) as tiles of pairs of 16 columns each. Columns that
// there are not leave the second ones as they are.
template <class Machine, int TERMS = 1>
MOLEX_INLINE void two_tiles_of_pairs(
    const Matrix& m, int64_t row, int64_t column, uint16_t* first, uint16_t* second) {
  const int64_t width = m.columns - column;
  if (m.column_stride != 1 || width < kDeep) {
    tiles_of_pairs<Machine, TERMS>(m, row, column, first);
    if (width > kSide) tiles_of_pairs<Machine, TERMS>(m, row, column + kSide, second);
    return;
  }
  const auto pair_all = [&](const uint16_t* from, int64_t stride, int64_t height) MOLEX_LAMBDA_INLINE {
    static constexpr uint16_t kZeros[kDeep] = {};
    for (int64_t r = 0; r < kDeep; r += 2, from += 2 * stride) {
      const uint16_t* const even = r < height ? from : kZeros;
      const uint16_t* const odd = r + 1 < height ? from + stride : kZeros;
      Machine::pair(even, odd, first + r * kSide, second + r * kSide);
    }
    first += kTile, second += kTile;
  };
  if constexpr (TERMS == 1) {
    pair_all(element(m, row, column), m.row_stride, std::min(m.rows - row, kDeep));
  } else {
    alignas(64) uint16_t parts[2][2 * kTile];
    split<Machine, kDeep, kDeep>(m, row, column, parts[0], parts[1]);
    for (const auto& part : parts) pair_all(part, kDeep, kDeep);
  }
}

// Asks for `count` lines, `stride` elements apart, that are about to be read. The processor foresees rows
// that are read one after the other, but not one line of each of many rows.
MOLEX_INLINE void expect_reads(const uint16_t* from, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(from + i * stride);
}

// All tiles of pairs of the columns [column, column + 16).
template <class Machine, int TERMS = 1>
MOLEX_INLINE void panel_of_pairs(const Matrix& m, int64_t column, uint16_t* to) {
  const int64_t next = column + kSide;
  const int64_t ahead = TERMS == 1 && m.row_stride == 1 ? std::clamp<int64_t>(m.columns - next, 0, kSide) : 0;
  for (int64_t row = 0; row < m.rows; row += kDeep, to += TERMS * kTile) {
    expect_reads(element(m, row, next), m.column_stride, ahead);
    tiles_of_pairs<Machine, TERMS>(m, row, column, to);
  }
}

}  // namespace molex
