// Blocks of products on matrix tiles. A tile of the left operand is 16 rows of 32 elements, one of the right
// operand 16 pairs of elements for 16 columns; tiles of one row or column of tiles follow each other in the
// order in which they are summed. Behind the end of a matrix stand zeros. Where TERMS is 2, matrices are fp16
// or fp32, and behind each tile of high parts stands that of the low ones.

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

// Rows of 32 results of 16 bits that wait to be written. Stores leave the processor in order, each after its
// line has come, and loads of the next product wait for those at the same place of a page: written all at
// once, such rows take as long as the product. So some are written at each of its steps, to lines that were
// asked for some steps before.
template <class Machine>
class Waiting {
 public:
  ~Waiting() { flush(); }

  // Where the results for out[row : row + count, column : column + kDeep] are to be put, row by row;
  // count <= 2 * kSide. They are written during the next product.
  uint16_t* open(const Matrix& out, int64_t row, int64_t count, int64_t column) {
    flush();
    stride_ = out.row_stride;
    to_ = static_cast<uint16_t*>(out.data) + row * stride_ + column;
    count_ = count;
    for (next_ = 0; next_ < std::min(kAhead, count_); ++next_) Machine::expect_write(to_ + next_ * stride_);
    next_ = 0;
    return rows_;
  }

  // Called at each step of a product.
  MOLEX_INLINE void operator()() {
    const int64_t end = std::min(next_ + kAtOnce, count_);
    for (; next_ < end; ++next_) {
      write(next_);
      if (next_ + kAhead < count_) Machine::expect_write(to_ + (next_ + kAhead) * stride_);
    }
  }

 private:
  static constexpr int64_t kAtOnce = 2, kAhead = 12;

  MOLEX_INLINE void write(int64_t row) const {
    std::memcpy(to_ + row * stride_, rows_ + row * kDeep, kDeep * sizeof(uint16_t));
  }
  MOLEX_INLINE void flush() {
    for (; next_ < count_; ++next_) write(next_);
  }

  alignas(64) uint16_t rows_[2 * kTile];
  uint16_t* to_ = nullptr;
  int64_t stride_ = 0, next_ = 0, count_ = 0;
};

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

// The transposes of one or two tiles of sums, `apart` floats from each other, as 16 rows of kDeep elements of
// 16 bits, one after the other, with the bias of each of `columns` columns.
template <class Machine>
MOLEX_INLINE void narrow_turned(
    const float* sums, int64_t apart, const float* bias, int64_t columns, void* to) {
  constexpr int64_t kLanes = Machine::kLanes;
  alignas(64) float pairs[kArea];
  if (columns <= kSide) std::memset(pairs + kArea / 2, 0, kArea / 2 * sizeof(float));
  for (int64_t n = 0; n < columns; n += 2) {
    const float even = bias ? bias[n] : 0.0f, odd = bias && n + 1 < columns ? bias[n + 1] : 0.0f;
    const float* const from = sums + n / kSide * apart + n % kSide * kSide;
    for (int64_t r = 0; r < kSide; r += kLanes) {
      Machine::interleave(load<kLanes>(from + r) + even,
                          load<kLanes>(from + kSide + r) + odd,
                          reinterpret_cast<uint16_t*>(pairs + n / 2 * kSide + r));
    }
  }
  Machine::turn_16(pairs, kSide, to, kSide);
}

// Rounds up to 32 numbers to fp16; there is room for 32.
template <class Machine>
MOLEX_INLINE void write_halves(const float* from, int64_t columns, uint16_t* to) {
  alignas(64) uint16_t whole[kDeep];
  uint16_t* const made = columns < kDeep ? whole : to;
  for (int64_t i = 0; i < kDeep; i += Machine::kLanes) {
    Machine::narrow_halves(load<Machine::kLanes>(from + i), made + i);
  }
  if (columns < kDeep) std::memcpy(to, whole, columns * sizeof(uint16_t));
}

// The transposes of one or two tiles of sums, `apart` floats from each other, with the bias of each column,
// as `rows` <= 16 rows of `columns` <= 32 floats.
template <class Machine>
MOLEX_INLINE void turn_sums(const float* sums,
                            int64_t apart,
                            const float* bias,
                            int64_t rows,
                            int64_t columns,
                            float* to,
                            int64_t stride) {
  alignas(64) float turned[kArea];
  for (int64_t n = 0; n < columns; n += kSide) {
    const int64_t width = std::min(columns - n, kSide);
    if (rows == kSide && width == kSide && !bias) {
      Machine::turn_16(sums + n / kSide * apart, kSide, to + n, stride);
      continue;
    }
    Machine::turn_16(sums + n / kSide * apart, kSide, turned, kSide);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const from = turned + r * kSide;
      float* const row = to + r * stride + n;
      if (bias) {
        for (int64_t i = 0; i < width; ++i) row[i] = from[i] + bias[n + i];
      } else if (width == kSide) {
        std::memcpy(row, from, kSide * sizeof(float));
      } else {
        std::memcpy(row, from, width * sizeof(float));
      }
    }
  }
}

// The same as rows of a matrix of any dtype.
template <class Machine>
MOLEX_INLINE void write_turned(const float* sums,
                               int64_t apart,
                               const float* bias,
                               int64_t rows,
                               int64_t columns,
                               const Target& to,
                               int64_t at,
                               int64_t stride) {
  alignas(64) float turned[kArea];
  if (to.dtype == ScalarType::Float) {
    float* const out = static_cast<float*>(to.data) + at;
    return turn_sums<Machine>(sums, apart, bias, rows, columns, out, stride);
  }
  if (to.dtype == ScalarType::Half) {
    alignas(64) float whole[kSide * kDeep] = {};
    turn_sums<Machine>(sums, apart, bias, rows, columns, whole, kDeep);
    uint16_t* const out = static_cast<uint16_t*>(to.data) + at;
    for (int64_t r = 0; r < rows; ++r) write_halves<Machine>(whole + r * kDeep, columns, out + r * stride);
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(to.data) + at;
  narrow_turned<Machine>(sums, apart, bias, columns, turned);
  for (int64_t r = 0; r < rows; ++r) {
    const float* const from = turned + r * kSide;
    if (columns == kDeep) {
      std::memcpy(out + r * stride, from, kDeep * sizeof(uint16_t));
    } else {
      std::memcpy(out + r * stride, from, columns * sizeof(uint16_t));
    }
  }
}

// Writes the transposed sums of `count` <= 2 panels from `first` on, as multiply_strip gives them, to up to
// 32 columns of a matrix from `column` on; whole ones wait.
template <class Machine>
MOLEX_INLINE void put_turned(Waiting<Machine>& waiting,
                             const float* sums,
                             int64_t first,
                             int64_t count,
                             const float* bias,
                             const Matrix& out,
                             int64_t column,
                             int64_t columns) {
  const int64_t row = first * kSide, rows = std::min(count * kSide, out.rows - row);
  if (out.dtype != ScalarType::BFloat16 || columns < kDeep) {
    for (int64_t p = 0; p < count; ++p) {
      write_turned<Machine>(sums + p * kArea,
                            count * kArea,
                            bias,
                            std::min(rows - p * kSide, kSide),
                            columns,
                            out.target(),
                            (row + p * kSide) * out.row_stride + column,
                            out.row_stride);
    }
    return;
  }
  uint16_t* const to = waiting.open(out, row, rows, column);
  for (int64_t p = 0; p < count; ++p) {
    narrow_turned<Machine>(sums + p * kArea, count * kArea, bias, columns, to + p * kTile);
  }
}

}  // namespace molex
