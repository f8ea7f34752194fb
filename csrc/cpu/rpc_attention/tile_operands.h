// Operands of products on matrix tiles, for attention in bf16.
//
// A tile is 16 rows of 32 bf16. As the left operand it holds 16 rows and 32 terms of the sum; as the right
// one, 16 pairs of terms and 16 columns, the two terms of a pair side by side. Both kinds are made of rows of
// floats, and each turns into the other by exchanging rows and pairs:
//
//   rows_of_tiles   x [rows, width] as a left operand, summed over its columns;
//   turned, x^T as a right operand: scores q k^T are (rows of q) (turned rows of k);
//   pairs_of_tiles  x as a right operand, summed over its rows: P v is (rows of P) (pairs of v);
//   turned, x^T as a left operand: (P^T g)^T is (turned pairs of g) (pairs of P).
//
// Rows are padded with zeros to a multiple of 32.

#pragma once

#include <algorithm>

#include "cpu/rpc_attention/steps.h"

namespace molex::rpc {

constexpr int64_t kTileRows = 16, kTile = kTileRows * kTileDepth;

// Tiles in memory: distances, in elements, from one to the next along the rows (of a left operand) or the
// columns (of a right one), and along the sum.
struct TileOperand {
  const uint16_t* data;
  int64_t outer, inner;

  TileOperand from(int64_t outer_tiles, int64_t inner_tiles) const {
    return {data + outer_tiles * outer + inner_tiles * inner, outer, inner};
  }
};

// Operands made by the functions below, of rows whose padded width is `padded`.
inline TileOperand summed_over_columns(const uint16_t* tiles, int64_t padded) {
  return {tiles, padded * kTileRows, kTile};
}
inline TileOperand summed_over_rows(const uint16_t* tiles, int64_t padded) {
  return {tiles, kTile, padded * kTileDepth};
}

// c [M tiles, N tiles] (+)= a b, of at most 2 by 2 tiles.
template <class Tiles, int M, int N>
MOLEX_INLINE void multiply_block(
    Tiles& tiles, TileOperand a, TileOperand b, int64_t depth, float* c, int64_t ldc, bool add) {
  const int64_t bytes = ldc * sizeof(float), tile_bytes = kTileDepth * sizeof(uint16_t);
  float* const below = c + kTileRows * ldc;
  if (add) {
    tiles.template load<0>(c, bytes);
    if constexpr (N == 2) tiles.template load<1>(c + kTileRows, bytes);
    if constexpr (M == 2) tiles.template load<2>(below, bytes);
    if constexpr (M == 2 && N == 2) tiles.template load<3>(below + kTileRows, bytes);
  } else {
    tiles.template zero<0>();
    if constexpr (N == 2) tiles.template zero<1>();
    if constexpr (M == 2) tiles.template zero<2>();
    if constexpr (M == 2 && N == 2) tiles.template zero<3>();
  }
  const uint16_t *left = a.data, *right = b.data;
  for (int64_t k = 0; k < depth; ++k, left += a.inner, right += b.inner) {
    tiles.template load<6>(right, tile_bytes);
    tiles.template load<4>(left, tile_bytes);
    tiles.template dot<0, 4, 6>();
    if constexpr (N == 2) {
      tiles.template load<7>(right + b.outer, tile_bytes);
      tiles.template dot<1, 4, 7>();
    }
    if constexpr (M == 2) {
      tiles.template load<5>(left + a.outer, tile_bytes);
      tiles.template dot<2, 5, 6>();
    }
    if constexpr (M == 2 && N == 2) tiles.template dot<3, 5, 7>();
  }
  tiles.template store<0>(c, bytes);
  if constexpr (N == 2) tiles.template store<1>(c + kTileRows, bytes);
  if constexpr (M == 2) tiles.template store<2>(below, bytes);
  if constexpr (M == 2 && N == 2) tiles.template store<3>(below + kTileRows, bytes);
}

// c (+)= a b: `rows` by `columns` tiles of floats, a sum over `depth` tiles.
template <class Tiles>
MOLEX_INLINE void multiply_tiles(Tiles& tiles,
                                 TileOperand a,
                                 int64_t rows,
                                 TileOperand b,
                                 int64_t columns,
                                 int64_t depth,
                                 float* c,
                                 int64_t ldc,
                                 bool add) {
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) {
    float* const to = c + m * kTileRows * ldc;
    int64_t n = 0;
    for (; n + 2 <= columns; n += 2) {
      multiply_block<Tiles, 2, 2>(tiles, a.from(m, 0), b.from(n, 0), depth, to + n * kTileRows, ldc, add);
    }
    if (n < columns) {
      multiply_block<Tiles, 2, 1>(tiles, a.from(m, 0), b.from(n, 0), depth, to + n * kTileRows, ldc, add);
    }
  }
  if (m == rows) return;
  float* const to = c + m * kTileRows * ldc;
  int64_t n = 0;
  for (; n + 2 <= columns; n += 2) {
    multiply_block<Tiles, 1, 2>(tiles, a.from(m, 0), b.from(n, 0), depth, to + n * kTileRows, ldc, add);
  }
  if (n < columns) {
    multiply_block<Tiles, 1, 1>(tiles, a.from(m, 0), b.from(n, 0), depth, to + n * kTileRows, ldc, add);
  }
}

// 32 floats as they lie in vectors.
template <int LANES>
struct Run {
  static constexpr int kVectors = kTileDepth / LANES;
  Floats<LANES> part[kVectors] = {};

  static MOLEX_INLINE Run at(const float* from) {
    Run run;
    for (int v = 0; v < kVectors; ++v) run.part[v] = load<LANES>(from + v * LANES);
    return run;
  }
};

template <int LANES>
MOLEX_INLINE float sum_of_run(Run<LANES> run) {
  return sum_of_parts(run.part);
}

// Rounds a run into the row of a tile.
template <class Machine>
MOLEX_INLINE void store_row(const Run<Machine::kLanes>& x, uint16_t* to) {
  if constexpr (Machine::kLanes == 16) {
    Machine::narrow(x.part[0], x.part[1], to);
  } else {
    for (int v = 0; v < x.kVectors; v += 2) {
      Machine::narrow(x.part[v], x.part[v + 1], to + v * Machine::kLanes);
    }
  }
}

// Rounds the same 32 columns of two rows into the row of pairs of two tiles side by side.
template <class Machine>
MOLEX_INLINE void store_pairs(const Run<Machine::kLanes>& even,
                              const Run<Machine::kLanes>& odd,
                              uint16_t* to) {
  constexpr int kPerTile = kTileRows / Machine::kLanes;
  for (int v = 0; v < even.kVectors; ++v) {
    Machine::interleave(
        even.part[v], odd.part[v], to + v / kPerTile * kTile + v % kPerTile * 2 * Machine::kLanes);
  }
}

// Writes x [rows, padded] as left tiles, padded to 32 rows: [rows / 16][padded / 32].
template <class Machine>
MOLEX_INLINE void rows_of_tiles(const float* x, int64_t rows, int64_t padded, uint16_t* to) {
  const int64_t whole = (rows + kTileDepth - 1) / kTileDepth * kTileDepth;
  for (int64_t r = 0; r < whole; ++r) {
    uint16_t* row = to + r / kTileRows * kTileRows * padded + r % kTileRows * kTileDepth;
    for (int64_t c = 0; c < padded; c += kTileDepth, row += kTile) {
      store_row<Machine>(r < rows ? Run<Machine::kLanes>::at(x + r * padded + c) : Run<Machine::kLanes>{},
                         row);
    }
  }
}

// Writes x [rows, padded] as right tiles, padded to 32 rows: [rows / 32][padded / 16].
template <class Machine>
MOLEX_INLINE void pairs_of_tiles(const float* x, int64_t rows, int64_t padded, uint16_t* to) {
  using Floats32 = Run<Machine::kLanes>;
  const int64_t whole = (rows + kTileDepth - 1) / kTileDepth * kTileDepth;
  for (int64_t r = 0; r < whole; r += 2) {
    uint16_t* pairs = to + r / kTileDepth * kTileDepth * padded + r % kTileDepth * kTileRows;
    for (int64_t c = 0; c < padded; c += kTileDepth, pairs += 2 * kTile) {
      const float* from = x + r * padded + c;
      store_pairs<Machine>(r < rows ? Floats32::at(from) : Floats32{},
                           r + 1 < rows ? Floats32::at(from + padded) : Floats32{},
                           pairs);
    }
  }
}

}  // namespace molex::rpc
