// Sixteen short rows side by side. Lane i of a column holds an element of row i, so that what is taken over a
// row (a maximum, a sum) needs no exchange between lanes. A row's result does not depend on the rows beside
// it, nor on the width of the machine's registers.

#pragma once

#include <limits>

#include "cpu/common/vector.h"

namespace molex {

constexpr int64_t kTogether = 16;  // rows

// Rows of more elements are as fast one by one: vectors then hold elements of one row.
constexpr int64_t kShort = 64;

template <int FIRST, class V>
MOLEX_INLINE V unpacked(V a, V b) {  // a, b, a, b from element FIRST of each on
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, FIRST, FIRST + 4, FIRST + 1, FIRST + 5);
#else  // GCC 11
  return __builtin_shuffle(a, b, Ints<4>{FIRST, FIRST + 4, FIRST + 1, FIRST + 5});
#endif
}

// Transposes a block of 4 x 4 floats.
MOLEX_INLINE void turn(Floats<4> (&x)[4]) {
  const Floats<4> a = unpacked<0>(x[0], x[2]), b = unpacked<0>(x[1], x[3]);
  const Floats<4> c = unpacked<2>(x[0], x[2]), d = unpacked<2>(x[1], x[3]);
  x[0] = unpacked<0>(a, b), x[1] = unpacked<2>(a, b), x[2] = unpacked<0>(c, d), x[3] = unpacked<2>(c, d);
}

// Writes `count` <= kTogether rows of `width` floats, `stride` apart, as columns [width, kTogether]. In place
// of the rows that are missing the first one stands.
MOLEX_INLINE void columns_of(const float* rows, int64_t stride, int64_t count, int64_t width, float* to) {
  for (int64_t i = 0; i < kTogether; i += 4) {
    const float* row[4];
    for (int64_t k = 0; k < 4; ++k) row[k] = rows + (i + k < count ? i + k : 0) * stride;
    int64_t e = 0;
    for (; e + 4 <= width; e += 4) {
      Floats<4> block[4] = {
          load<4>(row[0] + e), load<4>(row[1] + e), load<4>(row[2] + e), load<4>(row[3] + e)};
      turn(block);
      for (int64_t k = 0; k < 4; ++k) store(to + (e + k) * kTogether + i, block[k]);
    }
    for (; e < width; ++e) {
      for (int64_t k = 0; k < 4; ++k) to[e * kTogether + i + k] = row[k][e];
    }
  }
}

// Writes the first `count` rows of columns [width, kTogether], one after the other.
MOLEX_INLINE void rows_of(const float* columns, int64_t count, int64_t width, float* to) {
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t rows = count - i < 4 ? count - i : 4;
    float* const row = to + i * width;
    int64_t e = 0;
    for (; rows == 4 && e + 4 <= width; e += 4) {
      Floats<4> block[4];
      for (int64_t k = 0; k < 4; ++k) block[k] = load<4>(columns + (e + k) * kTogether + i);
      turn(block);
      for (int64_t k = 0; k < 4; ++k) store(row + k * width + e, block[k]);
    }
    for (; e < width; ++e) {
      for (int64_t k = 0; k < rows; ++k) row[k * width + e] = columns[e * kTogether + i + k];
    }
  }
}

// Replaces columns z by e^(scale (z_e - m)), where m is the largest value of a row and scale > 0; returns m
// and the sum. For as many rows as a vector has lanes.
template <int LANES>
MOLEX_INLINE auto column_exponentials(float* z, float scale, int64_t count) {
  using V = Floats<LANES>;
  struct {
    V largest, sum;
  } found = {V{} - std::numeric_limits<float>::infinity(), V{}};
  for (int64_t e = 0; e < count; ++e) found.largest = larger(load<LANES>(z + e * kTogether), found.largest);
  for (int64_t e = 0; e < count; ++e) {
    const V made = exponential((load<LANES>(z + e * kTogether) - found.largest) * scale);
    store(z + e * kTogether, made);
    found.sum += made;
  }
  return found;
}

// The inner product of each row with the same `count` weights.
template <int LANES>
MOLEX_INLINE Floats<LANES> column_dot(const float* columns, const float* weights, int64_t count) {
  Floats<LANES> sum = {};
  for (int64_t e = 0; e < count; ++e) sum += weights[e] * load<LANES>(columns + e * kTogether);
  return sum;
}

}  // namespace molex
