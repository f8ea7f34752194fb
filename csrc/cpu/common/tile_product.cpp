// The product of matrices on tiles. Where b's columns are contiguous, as those of a transposed weight, the
// product is that of the transposes, out^T = b^T a^T, since those columns are tiles of rows as they lie.

#include "cpu/common/tile_product.h"

#include "cpu/common/tile_results.h"

namespace molex {

namespace {

// Columns of the right operand that are multiplied at a time: they stay in the first-level cache.
constexpr int64_t kStrip = kDeep;

// Floats of their sums: those of two rows of tiles are written at once, unless they go on with the next
// block.
int64_t sums_of(int64_t row_tiles, int64_t deep, int64_t terms) {
  return (deep > kBlock / terms ? row_tiles : 2) * kSide * kStrip;
}

struct Call {
  Matrix out, a, b;
  const float* bias;
  uint16_t *packed, *strip;  // a whole operand, and a block of the other one
  float* sums;
};

// Writes a row of up to 32 sums.
template <class Machine>
MOLEX_INLINE void write_sums(
    const float* sums, const float* bias, int64_t columns, const Target& to, int64_t at) {
  constexpr int64_t kLanes = Machine::kLanes;
  alignas(64) float biased[kDeep];
  if (bias) {
    for (int64_t i = 0; i < columns; ++i) biased[i] = sums[i] + bias[i];
    for (int64_t i = columns; i < kDeep; ++i) biased[i] = 0.0f;
    sums = biased;
  }
  if (to.dtype == ScalarType::Float) {
    float* const out = static_cast<float*>(to.data) + at;
    if (columns == kDeep) {
      std::memcpy(out, sums, kDeep * sizeof(float));
    } else {
      std::memcpy(out, sums, columns * sizeof(float));
    }
    return;
  }
  uint16_t* const out = static_cast<uint16_t*>(to.data) + at;
  if (to.dtype == ScalarType::Half) return write_halves<Machine>(sums, columns, out);
  uint16_t whole[kDeep];
  uint16_t* const made = columns < kDeep ? whole : out;
  for (int64_t i = 0; i < kDeep; i += 2 * kLanes) {
    Machine::narrow(load<kLanes>(sums + i), load<kLanes>(sums + i + kLanes), made + i);
  }
  if (columns < kDeep) std::memcpy(out, whole, columns * sizeof(uint16_t));
}

template <int TERMS>
constexpr auto multiply_plain = tiled([](auto machine, const Call* call) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  constexpr int64_t kLanes = Machine::kLanes, kMost = kBlock / TERMS, kApart = TERMS * kTile;
  typename Machine::Tiles tiles;
  const auto& [out, a, b, bias, packed, strip, sums] = *call;
  const int64_t deep = parts(a.columns, kDeep), row_tiles = parts(a.rows, kSide);
  for (int64_t i = 0; i < row_tiles; ++i) {
    for (int64_t k = 0; k < deep; ++k) {
      tiles_of_rows<Machine, TERMS>(a, i * kSide, k * kDeep, packed + (i * deep + k) * kApart);
    }
  }
  const bool in_blocks = deep > kMost;
  Waiting<Machine> waiting;
  for (int64_t n = 0; n < b.columns; n += kStrip) {
    const int64_t used = std::min(kStrip, b.columns - n), column_tiles = parts(used, kSide);
    // What is written reads the second tile, too.
    if (column_tiles < 2) std::memset(sums, 0, sums_of(row_tiles, deep, TERMS) * sizeof(float));
    int64_t k = 0;
    do {
      const int64_t depth = std::min(kMost, deep - k);
      for (int64_t t = 0; t < depth; ++t) {
        two_tiles_of_pairs<Machine, TERMS>(
            b, (k + t) * kDeep, n, strip + t * kApart, strip + kBlock * kTile + t * kApart);
      }
      const bool is_last = k + kMost >= deep;
      for (int64_t i = 0; i < row_tiles; i += 2) {
        float* const made = sums + (in_blocks ? i * kSide * kStrip : 0);
        multiply_blocks<TERMS>(tiles,
                               Left{packed + (i * deep + k) * kApart, deep * kApart, kDeep, kApart},
                               std::min<int64_t>(2, row_tiles - i),
                               Right{strip, kBlock * kTile},
                               column_tiles,
                               Sums{made, kSide * kStrip, kSide, kStrip},
                               depth,
                               k > 0,
                               waiting);
        if (!is_last) continue;
        const int64_t row = i * kSide, rows = std::min(2 * kSide, a.rows - row);
        if (out.dtype == ScalarType::BFloat16 && used == kDeep && !bias) {
          uint16_t* const to = waiting.open(out, row, rows, n);
          for (int64_t at = 0; at < rows * kDeep; at += 2 * kLanes) {
            Machine::narrow(load<kLanes>(made + at), load<kLanes>(made + at + kLanes), to + at);
          }
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
          write_sums<Machine>(made + r * kStrip,
                              bias ? bias + n : nullptr,
                              used,
                              out.target(),
                              (row + r) * out.row_stride + n);
        }
      }
      k += kMost;
    } while (k < deep);
  }
});

template <int TERMS>
constexpr auto multiply_turned = tiled([](auto machine, const Call* call) MOLEX_LAMBDA_INLINE {
  using Machine = decltype(machine);
  typename Machine::Tiles tiles;
  const auto& [out, a, b, bias, packed, strip, sums] = *call;
  const int64_t panel = parts(a.columns, kDeep) * TERMS * kTile, panels = parts(a.rows, kSide);
  for (int64_t p = 0; p < panels; ++p) {
    panel_of_pairs<Machine, TERMS>(a.transposed(), p * kSide, packed + p * panel);
  }
  const Matrix weight = b.transposed();
  Waiting<Machine> waiting;
  for (int64_t n = 0; n < weight.rows; n += kDeep) {
    const int64_t used = std::min(kDeep, weight.rows - n);
    const Matrix bands[] = {weight.band(n, std::min(used, kSide)),
                            weight.band(n + kSide, std::max<int64_t>(used - kSide, 0))};
    const auto write = [&](int64_t first, int64_t count, const float* made) MOLEX_LAMBDA_INLINE {
      put_turned(waiting, made, first, count, bias ? bias + n : nullptr, out, n, used);
    };
    multiply_strip<Machine, TERMS>(
        tiles, bands, parts(used, kSide), packed, panels, strip, sums, waiting, write);
  }
});

constexpr auto all_finite =
    versions([](auto, const auto* from, auto exponent, int64_t count) MOLEX_LAMBDA_INLINE {
      decltype(exponent) found = 0;
      for (int64_t i = 0; i < count; ++i) {
        found |= (from[i] & exponent) == exponent;
      }
      return found == 0;
    });

bool is_finite(const Matrix& out) {
  bool finite = true;
  for (int64_t r = 0; r < out.rows && finite; ++r) {
    const void* const row = out.band(r, 1).data;
    finite = out.dtype == ScalarType::Float
                 ? all_finite(static_cast<const uint32_t*>(row), uint32_t{0x7f800000}, out.columns)
                 : all_finite(static_cast<const uint16_t*>(row), uint16_t{0x7c00}, out.columns);
  }
  return finite;
}

}  // namespace

void TileProduct::operator()(const Matrix& out, const Matrix& a, const Matrix& b, const float* bias) {
  if (out.rows == 0 || out.columns == 0) return;
  // bf16 is one term, fp16 and fp32 are two.
  const int64_t terms = a.dtype == ScalarType::BFloat16 ? 1 : 2;
  const int64_t tiles = parts(a.rows, kSide), deep = parts(a.columns, kDeep);
  const int64_t packed = tiles * deep * terms * kTile;
  const bool turned = b.row_stride == 1 && b.column_stride != 1;
  const int64_t sums = turned ? strip_sums(tiles, a.columns, terms) : sums_of(tiles, deep, terms);
  const int64_t bytes = Arena::bytes(packed, ScalarType::BFloat16) +
                        Arena::bytes(kCopies, ScalarType::BFloat16) + Arena::bytes(sums);
  if (!arena_ || bytes > bytes_) arena_.emplace(bytes), bytes_ = bytes;
  Arena& arena = *arena_;
  arena.clear();
  const auto take = [&](int64_t count) {
    return static_cast<uint16_t*>(arena.matrix(1, count, ScalarType::BFloat16).data);
  };
  const Call call{out, a, b, bias, take(packed), take(kCopies), arena.floats(sums)};
  if (terms == 1) {
    turned ? multiply_turned<1>(&call) : multiply_plain<1>(&call);
  } else {
    turned ? multiply_turned<2>(&call) : multiply_plain<2>(&call);
    if (!is_finite(out)) without_terms(out, a, b, bias);
  }
}

void TileProduct::without_terms(const Matrix& out, const Matrix& a, const Matrix& b, const float* bias) {
  scope_.reset();  // the BLAS may configure tiles of its own
  Arena arena(Arena::bytes(out.rows * out.columns) + Arena::bytes(a.rows * a.columns) +
              Arena::bytes(b.rows * b.columns));
  const Matrix made = arena.matrix(out.rows, out.columns, ScalarType::Float);
  multiply(
      made, in_floats(a, arena.floats(a.rows * a.columns)), in_floats(b, arena.floats(b.rows * b.columns)));
  for (int64_t r = 0; r < out.rows; ++r) {
    float* const row = static_cast<float*>(made.band(r, 1).data);
    if (bias) add(row, bias, out.columns);
    float* const to = place(out.target(), r * out.row_stride, row);
    if (to != row) std::copy_n(row, out.columns, to);
    write(out.target(), r * out.row_stride, out.columns, row);
  }
  scope_.emplace();
}

}  // namespace molex
