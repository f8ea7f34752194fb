// Blocks of products on matrix tiles, of packed operands.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/common/tile_packing.h"

namespace molex {

// Distances count elements: of tiles of other rows, of the rows of a tile, and of tiles of further terms.
struct Left {
  const uint16_t* data;
  int64_t tile, row, step;
};

struct Right {
  const uint16_t* data;
  int64_t tile;  // the distance of tiles of other columns
};

// Where sums lie: tile (i, j) at data + i * row + j * column, with rows that are `stride` floats apart.
struct Sums {
  float* data;
  int64_t row, column, stride;
};

struct Nothing {
  void operator()() const {}
};

// The product of one or two tiles of rows with one or two of columns, over `depth` tiles; `meanwhile` is
// called at each step.
template <int ROWS, int COLUMNS, int TERMS = 1, class Tiles, class Meanwhile = Nothing>
MOLEX_INLINE void multiply_tiles(Tiles& tiles,
                                 const Left& left,
                                 const Right& right,
                                 const Sums& sums,
                                 int64_t depth,
                                 bool add,
                                 Meanwhile&& meanwhile = {}) {
  const int64_t bytes = sums.stride * sizeof(float), row_bytes = left.row * sizeof(uint16_t);
  constexpr int64_t kPairBytes = kDeep * sizeof(uint16_t);
  float* const c[] = {
      sums.data, sums.data + sums.column, sums.data + sums.row, sums.data + sums.row + sums.column};
  if (add) {
    tiles.template load<0>(c[0], bytes);
    if constexpr (COLUMNS > 1) tiles.template load<1>(c[1], bytes);
    if constexpr (ROWS > 1) tiles.template load<2>(c[2], bytes);
    if constexpr (ROWS > 1 && COLUMNS > 1) tiles.template load<3>(c[3], bytes);
  } else {
    tiles.template zero<0>();
    if constexpr (COLUMNS > 1) tiles.template zero<1>();
    if constexpr (ROWS > 1) tiles.template zero<2>();
    if constexpr (ROWS > 1 && COLUMNS > 1) tiles.template zero<3>();
  }
  const auto load_left = [&](const uint16_t* from) MOLEX_LAMBDA_INLINE {
    tiles.template load<4>(from, row_bytes);
    if constexpr (ROWS > 1) tiles.template load<5>(from + left.tile, row_bytes);
  };
  const auto load_right = [&](const uint16_t* from) MOLEX_LAMBDA_INLINE {
    tiles.template load<6>(from, kPairBytes);
    if constexpr (COLUMNS > 1) tiles.template load<7>(from + right.tile, kPairBytes);
  };
  const auto dots = [&]() MOLEX_LAMBDA_INLINE {
    tiles.template dot<0, 4, 6>();
    if constexpr (COLUMNS > 1) tiles.template dot<1, 4, 7>();
    if constexpr (ROWS > 1) tiles.template dot<2, 5, 6>();
    if constexpr (ROWS > 1 && COLUMNS > 1) tiles.template dot<3, 5, 7>();
    meanwhile();
  };
  const uint16_t *a = left.data, *b = right.data;
  for (int64_t k = 0; k < depth; ++k, a += left.step, b += TERMS * kTile) {
    load_right(b);
    load_left(a);
    dots();
    if constexpr (TERMS > 1) {
      load_right(b + kTile);
      dots();
      load_right(b);
      load_left(a + kTile);
      dots();
    }
  }
  tiles.template store<0>(c[0], bytes);
  if constexpr (COLUMNS > 1) tiles.template store<1>(c[1], bytes);
  if constexpr (ROWS > 1) tiles.template store<2>(c[2], bytes);
  if constexpr (ROWS > 1 && COLUMNS > 1) tiles.template store<3>(c[3], bytes);
}

template <int TERMS = 1, class Tiles, class Meanwhile = Nothing>
MOLEX_INLINE void multiply_blocks(Tiles& tiles,
                                  const Left& left,
                                  int64_t rows,
                                  const Right& right,
                                  int64_t columns,
                                  const Sums& sums,
                                  int64_t depth,
                                  bool add,
                                  Meanwhile&& meanwhile = {}) {
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t j = 0; j < columns; j += 2) {
      const Left a{left.data + i * left.tile, left.tile, left.row, left.step};
      const Right b{right.data + j * right.tile, right.tile};
      const Sums c{sums.data + i * sums.row + j * sums.column, sums.row, sums.column, sums.stride};
      const bool two_rows = i + 1 < rows, two_columns = j + 1 < columns;
      if (two_rows && two_columns) multiply_tiles<2, 2, TERMS>(tiles, a, b, c, depth, add, meanwhile);
      if (two_rows && !two_columns) multiply_tiles<2, 1, TERMS>(tiles, a, b, c, depth, add, meanwhile);
      if (!two_rows && two_columns) multiply_tiles<1, 2, TERMS>(tiles, a, b, c, depth, add, meanwhile);
      if (!two_rows && !two_columns) multiply_tiles<1, 1, TERMS>(tiles, a, b, c, depth, add, meanwhile);
    }
  }
}

constexpr int64_t kCopies = 2 * kBlock * kTile;

// Floats of the sums of a strip: those of two panels are taken at once, unless they go on with the next block
// of terms.
inline int64_t strip_sums(int64_t panels, int64_t depth, int64_t terms = 1) {
  return (parts(depth, kDeep) > kBlock / terms ? parts(panels, 2) : 1) * 4 * kArea;
}

// One or two times up to 16 rows of a matrix, times all columns of the packed panels. As soon as the sums of
// `count` <= 2 panels from `first` on are known, take(first, count, sums) is called, while the first-level
// cache still holds them: tile (i, j) is at sums + (i * count + j) * kArea. Rows are read where they lie if
// they are whole tiles, else through `copies`, of kCopies elements.
template <class Machine, int TERMS = 1, class Meanwhile, class Take>
MOLEX_INLINE void multiply_strip(typename Machine::Tiles& tiles,
                                 const Matrix* bands,
                                 int64_t num_bands,
                                 const uint16_t* panels,
                                 int64_t num_panels,
                                 uint16_t* copies,
                                 float* sums,
                                 Meanwhile&& meanwhile,
                                 const Take& take) {
  const int64_t deep = parts(bands[0].columns, kDeep);
  constexpr int64_t kMost = kBlock / TERMS, kApart = TERMS * kTile;
  bool in_place = TERMS == 1 && bands[0].columns % kDeep == 0;
  for (int64_t i = 0; i < num_bands; ++i) {
    in_place &=
        bands[i].rows == kSide && bands[i].column_stride == 1 && bands[i].row_stride == bands[0].row_stride;
  }
  const int64_t apart = num_bands > 1 ? element(bands[1], 0, 0) - element(bands[0], 0, 0) : 0;
  int64_t k = 0;
  do {
    const int64_t depth = std::min(kMost, deep - k);
    Left left{element(bands[0], 0, k * kDeep), apart, bands[0].row_stride, kDeep};
    if (!in_place) {
      for (int64_t i = 0; i < num_bands; ++i) {
        for (int64_t t = 0; t < depth; ++t) {
          tiles_of_rows<Machine, TERMS>(
              bands[i], 0, (k + t) * kDeep, copies + i * kBlock * kTile + t * kApart);
        }
      }
      left = {copies, kBlock * kTile, kDeep, kApart};
    }
    for (int64_t j = 0; j < num_panels; j += 2) {
      const int64_t count = std::min<int64_t>(2, num_panels - j);
      float* const made = sums + (deep > kMost ? j * 2 * kArea : 0);
      multiply_blocks<TERMS>(tiles,
                             left,
                             num_bands,
                             {panels + (j * deep + k) * kApart, deep * kApart},
                             count,
                             {made, count * kArea, kArea, kSide},
                             depth,
                             k > 0,
                             meanwhile);
      if (k + kMost >= deep) take(j, count, made);
    }
    k += kMost;
  } while (k < deep);
}

}  // namespace molex
