// Operands of the merged layer's products on matrix tiles: tokens as they are packed, and weights as they are
// merged. A tile is 16 rows of 32 bf16; behind the end of a row or a column stand zeros.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/common/tile_blocks.h"

namespace molex::merging {

constexpr int64_t kMembers = 8;  // segments whose weights are merged in registers

// How a matrix [rows, columns] becomes tiles. Sums run over the columns in kRows and kTurned, over the rows
// in kPairs and kTurnedPairs; the tiles of one sum lie one after the other. The turned ones are transposed.
enum class Packing { kRows, kTurned, kPairs, kTurnedPairs };

inline int64_t packed_size(Packing packing, int64_t rows, int64_t columns) {
  const bool over_columns = packing == Packing::kRows || packing == Packing::kTurned;
  return over_columns ? parts(rows, kSide) * parts(columns, kDeep) * kTile
                      : parts(columns, kSide) * parts(rows, kDeep) * kTile;
}

inline constexpr auto pack = tiled(
    [](auto machine, Packing packing, const uint16_t* from, int64_t rows, int64_t columns, uint16_t* to)
        MOLEX_LAMBDA_INLINE {
          using Machine = decltype(machine);
          alignas(64) uint32_t made[kArea];
          const Matrix matrix = matrix_of(const_cast<uint16_t*>(from), ScalarType::BFloat16, rows, columns);
          if (packing == Packing::kRows || packing == Packing::kTurned) {
            for (int64_t r = 0; r < rows; r += kSide) {
              for (int64_t c = 0; c < columns; c += kDeep, to += kTile) {
                uint16_t* const tile = packing == Packing::kRows ? to : reinterpret_cast<uint16_t*>(made);
                tile_of_rows<Machine>(matrix, r, c, tile);
                if (packing == Packing::kTurned) Machine::turn_16(made, kSide, to, kSide);
              }
            }
          } else {
            for (int64_t c = 0; c < columns; c += kSide) {
              for (int64_t r = 0; r < rows; r += kDeep, to += kTile) {
                pair_rows(matrix, r, c, made);
                if (packing == Packing::kTurnedPairs) {
                  Machine::turn_16(made, kSide, to, kSide);
                } else {
                  std::memcpy(to, made, sizeof(made));
                }
              }
            }
          }
        });

template <class Machine>
MOLEX_INLINE typename Machine::V widened(const uint16_t* from) {
  using Values = typename Bf16Of<Machine::kLanes>::Values;
  using Bits = typename Bf16Of<Machine::kLanes>::Bits;
  Values values;
  __builtin_memcpy(&values, from, sizeof(values));
  return (typename Machine::V)(__builtin_convertvector(values, Bits) << 16);
}

// The weights of some segments: base [rows, width] + sum_e gates_se deltas_e. `gates` is [E, kMembers]:
// those of the segments side by side.
struct Merged {
  const uint16_t *base, *deltas;
  const float* gates;
  int64_t rows, width, experts, members;
  uint16_t* padded;  // scratch, [1 + E, 32]

  int64_t size() const { return rows * width; }
};

// Two vectors of the base and of the deltas, which lie `stride` apart.
struct Two {
  const uint16_t *base[2], *deltas[2];
  int64_t stride;
};

template <class Machine, int MEMBERS, class Write>
MOLEX_INLINE void merge_two(
    const Two& from, const float* gates, int64_t experts, int64_t first, const Write& write) {
  typename Machine::V low[MEMBERS], high[MEMBERS];
  low[0] = widened<Machine>(from.base[0]), high[0] = widened<Machine>(from.base[1]);
#pragma GCC unroll 8
  for (int s = 1; s < MEMBERS; ++s) low[s] = low[0], high[s] = high[0];
  for (int64_t e = 0; e < experts; ++e) {
    const auto a = widened<Machine>(from.deltas[0] + e * from.stride);
    const auto b = widened<Machine>(from.deltas[1] + e * from.stride);
    const float* const gate = gates + e * kMembers + first;
#pragma GCC unroll 8
    for (int s = 0; s < MEMBERS; ++s) low[s] += gate[s] * a, high[s] += gate[s] * b;
  }
#pragma GCC unroll 8
  for (int s = 0; s < MEMBERS; ++s) write(first + s, low[s], high[s]);
}

// Calls write(segment, first vector, second vector) for all segments.
template <class Machine, class Write>
MOLEX_INLINE void merge_members(const Merged& m, const Two& from, const Write& write) {
  int64_t s = 0;
  if (m.members == 8) return merge_two<Machine, 8>(from, m.gates, m.experts, 0, write);
  if (m.members >= 4) merge_two<Machine, 4>(from, m.gates, m.experts, s, write), s += 4;
  if (m.members - s >= 2) merge_two<Machine, 2>(from, m.gates, m.experts, s, write), s += 2;
  if (m.members - s >= 1) merge_two<Machine, 1>(from, m.gates, m.experts, s, write);
}

// Copies what there is of `count` elements at `at` of the base and of each delta into the scratch.
MOLEX_INLINE void pad(const Merged& m, int64_t at, int64_t count, int64_t there) {
  std::memcpy(m.padded + there, m.base + at, count * sizeof(uint16_t));
  for (int64_t e = 0; e < m.experts; ++e) {
    std::memcpy(m.padded + (1 + e) * kDeep + there, m.deltas + e * m.size() + at, count * sizeof(uint16_t));
  }
}

// Merges `height` rows from `row` on and `depth` tiles of columns from `column` on, as tiles of rows. A
// segment's tiles are `segment` apart, and those of 16 rows kBlock tiles.
template <class Machine>
MOLEX_INLINE void merge_rows(const Merged& m,
                             int64_t row,
                             int64_t height,
                             int64_t column,
                             int64_t depth,
                             uint16_t* to,
                             int64_t segment) {
  constexpr int64_t kLanes = Machine::kLanes;
  if (height % kSide) {  // rows that there are not
    for (int64_t s = 0; s < m.members; ++s) {
      std::memset(to + s * segment + height / kSide * kBlock * kTile, 0, depth * kTile * sizeof(uint16_t));
    }
  }
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t first = column + k * kDeep, at = (row + i) * m.width + first;
      const int64_t count = std::min(kDeep, m.width - first);
      const uint16_t *base = m.base + at, *deltas = m.deltas + at;
      int64_t stride = m.size();
      if (count < kDeep) {
        std::memset(m.padded, 0, (1 + m.experts) * kDeep * sizeof(uint16_t));
        pad(m, at, count, 0);
        base = m.padded, deltas = m.padded + kDeep, stride = kDeep;
      }
      uint16_t* const tile = to + (i / kSide * kBlock + k) * kTile + i % kSide * kDeep;
      for (int64_t c = 0; c < kDeep; c += 2 * kLanes) {
        const Two from{{base + c, base + c + kLanes}, {deltas + c, deltas + c + kLanes}, stride};
        merge_members<Machine>(m, from, [&](int64_t s, auto low, auto high) MOLEX_LAMBDA_INLINE {
          Machine::narrow(low, high, tile + s * segment + c);
        });
      }
      // A gate that is not finite has left NaN where the scratch has zeros.
      if (count == kDeep) continue;
      for (int64_t s = 0; s < m.members; ++s) {
        std::memset(tile + s * segment + count, 0, (kDeep - count) * sizeof(uint16_t));
      }
    }
  }
}

// Merges `depth` tiles of rows from `row` on and `tiles` tiles of columns from `column` on, two rows
// interleaved. A segment's tiles are `segment` apart, and those of 16 columns kBlock tiles.
template <class Machine>
MOLEX_INLINE void merge_pairs(const Merged& m,
                              int64_t row,
                              int64_t depth,
                              int64_t column,
                              int64_t tiles,
                              uint16_t* to,
                              int64_t segment) {
  constexpr int64_t kLanes = Machine::kLanes;
  for (int64_t i = 0; i < depth * kSide; ++i) {
    const int64_t even = row + 2 * i;
    for (int64_t j = 0; j < tiles; ++j) {
      uint16_t* const tile = to + (j * kBlock + i / kSide) * kTile + i % kSide * kDeep;
      if (even >= m.rows) {  // rows that there are not
        for (int64_t s = 0; s < m.members; ++s) std::memset(tile + s * segment, 0, kDeep * sizeof(uint16_t));
        continue;
      }
      const int64_t first = column + j * kSide, at = even * m.width + first;
      const int64_t count = std::min(kSide, m.width - first);
      const bool has_odd = even + 1 < m.rows;
      const uint16_t *base = m.base + at, *deltas = m.deltas + at;
      int64_t stride = m.size(), odd = m.width;
      if (count < kSide || !has_odd) {
        std::memset(m.padded, 0, (1 + m.experts) * kDeep * sizeof(uint16_t));
        pad(m, at, count, 0);
        if (has_odd) pad(m, at + m.width, count, kSide);
        base = m.padded, deltas = m.padded + kDeep, stride = kDeep, odd = kSide;
      }
      for (int64_t c = 0; c < kSide; c += kLanes) {
        const Two from{{base + c, base + odd + c}, {deltas + c, deltas + odd + c}, stride};
        merge_members<Machine>(m, from, [&](int64_t s, auto low, auto high) MOLEX_LAMBDA_INLINE {
          Machine::interleave(low, has_odd ? high : decltype(high){}, tile + s * segment + 2 * c);
        });
      }
    }
  }
}

// One or two rows of tiles times one or two others, over `depth` tiles. Rows of a are `a_row` apart. Tile
// (i, j) of the sums lies at c + i * c_row + j * c_column and has rows that are `c_stride` floats apart;
// where `add`, it is added to.
struct Strip {
  const uint16_t* a;
  int64_t a_row;
  const uint16_t* b;
  int64_t b_row;
  float* c;
  int64_t c_row, c_column, c_stride;
  int64_t depth;
  bool add;
};

// `rows` rows of tiles times `columns` others. The two of the shorter side stay in the cache.
template <class Tiles>
MOLEX_INLINE void multiply_strip(Tiles& tiles, const Strip& g, int64_t rows, int64_t columns, bool a_stays) {
  const int64_t outer = a_stays ? rows : columns, inner = a_stays ? columns : rows;
  for (int64_t i = 0; i < outer; i += 2) {
    for (int64_t j = 0; j < inner; j += 2) {
      const int64_t row = a_stays ? i : j, column = a_stays ? j : i;
      const Left left{g.a + row * g.a_row, g.a_row, kDeep, kTile};
      const Right right{g.b + column * g.b_row, g.b_row};
      const Sums sums{g.c + row * g.c_row + column * g.c_column, g.c_row, g.c_column, g.c_stride};
      const bool two_rows = row + 1 < rows, two_columns = column + 1 < columns;
      if (two_rows && two_columns) multiply_tiles<2, 2>(tiles, left, right, sums, g.depth, g.add);
      if (two_rows && !two_columns) multiply_tiles<2, 1>(tiles, left, right, sums, g.depth, g.add);
      if (!two_rows && two_columns) multiply_tiles<1, 2>(tiles, left, right, sums, g.depth, g.add);
      if (!two_rows && !two_columns) multiply_tiles<1, 1>(tiles, left, right, sums, g.depth, g.add);
    }
  }
}

}  // namespace molex::merging
