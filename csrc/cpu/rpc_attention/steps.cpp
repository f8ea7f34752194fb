#include "cpu/rpc_attention/steps.h"

#include <algorithm>
#include <cmath>

namespace molex::rpc {

Problem::Problem(const Tensor& keys,
                 const Tensor& values,
                 const Optional& queries,
                 const Tensor& bound,
                 const Optional& key_mask,
                 const Optional& seed,
                 int64_t num_iters,
                 double score_scale,
                 bool is_causal,
                 double dropout_p)
    : dtype(keys.scalar_type()),
      batch(keys.size(0)),
      heads(keys.size(1)),
      length(keys.size(2)),
      width(keys.size(3)),
      iterations(num_iters),
      scale(static_cast<float>(score_scale)),
      causal(is_causal),
      by_token(bound.dim() == 3),
      tiled(on_tiles(dtype)),
      dropout(seed, dropout_p) {
  const auto keep = [&](const Tensor& t) -> const Tensor& { return kept.emplace_back(t); };
  k = Heads(keep(dense(keys)));
  v = Heads(keep(dense(values)));
  if (queries) q = Heads(keep(dense(*queries)));
  threshold = keep(torch::stable::contiguous(bound)).const_data_ptr<float>();
  if (key_mask) mask = keep(torch::stable::contiguous(*key_mask)).const_data_ptr<bool>();
}

Tokens::Tokens(const Problem& problem, int64_t index) : p(problem), head(index) {
  const bool* there = p.mask ? p.mask + head / p.heads * p.length : nullptr;
  for (int64_t i = 0; i < p.length; ++i) {
    if (there && !there[i]) continue;
    place.push_back(i);
    bound.push_back(p.threshold[p.by_token ? head * p.length + i : head]);
  }
}

void Tokens::read_rows(const Heads& from, float* to) const {
  const int64_t start = head / p.heads * from.batch + head % p.heads * from.head, padded = p.padded();
  for (int64_t i = 0; i < count(); ++i, to += padded) {
    const float* row = read(from.source, start + place[i] * from.row, p.width, to);
    if (row != to) std::copy_n(row, p.width, to);
    std::fill(to + p.width, to + padded, 0.0f);
  }
}

void Tokens::write_rows(Target to, const float* from) const {
  std::vector<float> nothing;
  int64_t i = 0;
  for (int64_t row = 0; row < p.length; ++row) {
    const float* values;
    if (i < count() && place[i] == row) {
      values = from + i++ * p.padded();
    } else {
      nothing.resize(p.width);
      values = nothing.data();
    }
    const int64_t first = (head * p.length + row) * p.width;
    if (to.dtype == ScalarType::Float) std::copy_n(values, p.width, static_cast<float*>(to.data) + first);
    write(to, first, p.width, values);
  }
}

void Tokens::read_numbers(const float* from, float* to) const {
  for (int64_t i = 0; i < count(); ++i) to[i] = from[head * p.length + place[i]];
}

void Tokens::write_numbers(float* to, const float* from) const {
  std::fill_n(to + head * p.length, p.length, 0.0f);
  for (int64_t i = 0; i < count(); ++i) to[head * p.length + place[i]] = from[i];
}

namespace {

// Outside the threshold, S = a - sign(a) T: k cancels in K~ and w, and with it the rounding error of a. K~ is
// NaN if S is infinite.
constexpr auto soft_threshold_row = versions([](auto registers,
                                                float bound,
                                                int64_t width,
                                                const float* k,
                                                const float* low_rank,
                                                const float* u,
                                                float* clean,
                                                float* w,
                                                float* sparse) MOLEX_LAMBDA_INLINE {
  constexpr int kLanes = registers.kLanes;
  using V = Floats<kLanes>;
  for (int64_t c = 0; c < width; c += kLanes) {
    const V key = load<kLanes>(k + c), before = load<kLanes>(low_rank + c), dual = load<kLanes>(u + c);
    const V a = key - before + dual;
    const V shift = a > 0.0f ? broadcast<kLanes>(bound) : a < 0.0f ? broadcast<kLanes>(-bound) : a * bound;
    const V outside = a - shift;
    const auto inside = (a < 0.0f ? -a : a) < bound;
    store(clean + c, inside ? key - dual : before - (dual + dual) + shift + (outside - outside));
    store(w + c, inside ? dual + key : before + shift);
    if (sparse) store(sparse + c, inside ? V{} : outside);
  }
});

// Transposes four rows at a time, four columns of each.
constexpr auto transpose = versions(
    [](auto, const float* from, int64_t rows, int64_t width, int64_t padded, float* to) MOLEX_LAMBDA_INLINE {
      using V = Floats<4>;
      for (int64_t r = 0; r < kBlock; r += 4) {
        V row[4];
        for (int64_t c = 0; c < width; c += 4) {
          for (int i = 0; i < 4; ++i) row[i] = r + i < rows ? load<4>(from + (r + i) * padded + c) : V{};
          for (int i = 0; i < 4 && c + i < width; ++i) {
            store(to + (c + i) * kBlock + r, V{row[0][i], row[1][i], row[2][i], row[3][i]});
          }
        }
      }
    });

constexpr auto drop = versions([](auto,
                                  const Dropout& dropout,
                                  uint64_t first,
                                  const int64_t* place,
                                  int64_t count,
                                  uint64_t step,
                                  float* to) MOLEX_LAMBDA_INLINE {
  for (int64_t i = 0; i < count; ++i) to[i] = dropout(1.0f, first + static_cast<uint64_t>(place[i]) * step);
});

}  // namespace

void soft_threshold(const Tokens& tokens,
                    const float* k,
                    const float* low_rank,
                    const float* u,
                    float* clean,
                    float* w,
                    float* sparse) {
  const int64_t width = tokens.p.padded();
  for (int64_t i = 0; i < tokens.count(); ++i) {
    const int64_t at = i * width;
    soft_threshold_row(tokens.bound[i],
                       width,
                       k + at,
                       low_rank + at,
                       u + at,
                       clean + at,
                       w + at,
                       sparse ? sparse + at : nullptr);
  }
}

void subtract(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] -= y[i];
}

void round_through(ScalarType dtype, float* x, int64_t count) {
  constexpr int64_t kPiece = 512;
  if (dtype == ScalarType::Float) return;
  c10::BFloat16 bfloats[kPiece];
  c10::Half halves[kPiece];
  for (int64_t first = 0; first < count; first += kPiece) {
    const int64_t length = std::min(kPiece, count - first);
    if (dtype == ScalarType::BFloat16) {
      narrow(x + first, bfloats, length);
      widen(bfloats, x + first, length);
    } else {
      narrow(x + first, halves, length);
      widen(halves, x + first, length);
    }
  }
}

void transpose_blocks(const float* from, int64_t rows, int64_t width, int64_t padded, float* to) {
  for (int64_t first = 0; first < rows; first += kBlock) {
    transpose(from + first * padded, std::min(kBlock, rows - first), width, padded, to + first * width);
  }
}

void dropout_block(
    const Tokens& tokens, int64_t first_row, int64_t first_column, bool transposed, float* to) {
  const Problem& p = tokens.p;
  const int64_t *rows = tokens.place.data() + first_row, *columns = tokens.place.data() + first_column;
  const uint64_t length = p.length, start = tokens.head * length * length;
  for (int64_t r = 0; r < tokens.rows_of(first_row); ++r) {
    const uint64_t row = rows[r];
    drop(p.dropout,
         start + (transposed ? row : row * length),
         columns,
         tokens.rows_of(first_column),
         transposed ? length : 1,
         to + r * kBlock);
    std::fill(to + r * kBlock + tokens.rows_of(first_column), to + (r + 1) * kBlock, 0.0f);
  }
}

void dropout_row(const Tokens& tokens, int64_t row, int64_t first_column, int64_t count, float* to) {
  const uint64_t length = tokens.p.length, first = (tokens.head * length + tokens.place[row]) * length;
  drop(tokens.p.dropout, first, tokens.place.data() + first_column, count, 1, to);
}

}  // namespace molex::rpc
