// Sums of products on matrix tiles, rounded and written as rows of a matrix.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/common/tile_packing.h"

namespace molex {

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
