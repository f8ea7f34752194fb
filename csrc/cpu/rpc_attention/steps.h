// Robust attention on a CPU: what the forward and the backward pass share.
//
// One thread runs all iterations of a head, in blocks of kBlock by kBlock tokens whose scores fit in the
// first-level cache: no N x N matrix is written. Without q the scores are symmetric, and a block of them
// serves its rows and its columns. Tokens outside the key mask are left out from the start: a head holds the
// rows that exist, one after the other, padded with zeros to a multiple of kPad features. Arithmetic is fp32,
// but for products of bf16 where the machine has matrix tiles for them (tile_forward.h, tile_backward.h).

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "cpu/common/gemm.h"
#include "cpu/common/philox.h"
#include "cpu/common/rows.h"
#include "cpu/common/tiles.h"

namespace molex::rpc {

using Optional = std::optional<Tensor>;

constexpr int64_t kBlock = 48;  // a multiple of every vector's width and of the products' rows
constexpr int64_t kPad = 16;
constexpr int64_t kTileDepth = 32;  // bf16 in a row of a tile

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A tensor [B, H, N, d] with unit stride in d; strides count elements.
struct Heads {
  Source source;
  int64_t batch = 0, head = 0, row = 0;

  Heads() = default;
  explicit Heads(const Tensor& t)
      : source(source_of(t)), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)) {}
  explicit operator bool() const { return static_cast<bool>(source); }
};

// The tensor itself where its rows are dense, else a copy.
inline Tensor dense(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}
inline Optional dense(const Optional& t) { return t ? Optional(dense(*t)) : std::nullopt; }
inline Heads heads_of(const Optional& t) { return t ? Heads(*t) : Heads(); }

// The operators' inputs and options. Holds the tensors that it points into.
struct Problem {
  Problem(const Tensor& keys,
          const Tensor& values,
          const Optional& queries,
          const Tensor& bound,
          const Optional& key_mask,
          const Optional& seed,
          int64_t num_iters,
          double score_scale,
          bool is_causal,
          double dropout_p);

  std::vector<Tensor> kept;
  ScalarType dtype;
  int64_t batch, heads, length, width, iterations;
  float scale;
  bool causal, by_token;
  bool tiled;  // products are of bf16, on matrix tiles
  Heads k, v, q;
  const float* threshold;
  const bool* mask = nullptr;
  Dropout dropout;

  int64_t all_heads() const { return batch * heads; }
  int64_t padded() const { return round_up(width, tiled ? kTileDepth : kPad); }
  // Whether a block of scores also serves its columns.
  bool symmetric() const { return !q && !causal; }
};

// The tokens that exist in the sequence of one head.
struct Tokens {
  Tokens(const Problem& problem, int64_t index);

  const Problem& p;
  int64_t head;
  std::vector<int64_t> place;  // in the sequence
  std::vector<float> bound;

  int64_t count() const { return static_cast<int64_t>(place.size()); }
  int64_t rows_of(int64_t first) const { return std::min(kBlock, count() - first); }

  // Reads rows as floats and pads them with zeros.
  void read_rows(const Heads& from, float* to) const;
  // Writes the rows of this head in a contiguous tensor [B, H, N, d]; rows without a token become 0.
  void write_rows(Target to, const float* from) const;
  // Reads or writes one number for each row, [B, H, N].
  void read_numbers(const float* from, float* to) const;
  void write_numbers(float* to, const float* from) const;
};

// Arrays of one thread, aligned to lines of the cache.
class Scratch {
 public:
  template <class Number = float>
  Number* take(int64_t count) {
    Number* const array = new (std::align_val_t(64)) Number[std::max<int64_t>(count, 1)];
    arrays_.emplace_back(array);
    return array;
  }
  template <class Number = float>
  Number* take_zeros(int64_t count) {
    Number* const array = take<Number>(count);
    std::fill_n(array, count, Number{});
    return array;
  }

 private:
  struct Free {
    void operator()(void* array) const { ::operator delete[](array, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<void, Free>> arrays_;
};

// Visits every pair of blocks whose scores are needed, as (first row, first column); those on the diagonal
// come first.
template <class Visit>
void visit_blocks(const Problem& p, int64_t count, const Visit& visit) {
  for (int64_t i = 0; i < count; i += kBlock) visit(i, i);
  for (int64_t i = 0; i < count; i += kBlock) {
    for (int64_t j = p.symmetric() ? i + kBlock : 0; j < (p.causal ? i : count); j += kBlock) {
      if (i != j) visit(i, j);
    }
  }
}

// The scores of a block are scale * z. In row r the first `seen(r)` columns count.
struct Scores {
  const float* z;  // [rows, kBlock]
  float scale;
  int64_t rows, columns;
  bool triangular;  // a block on the diagonal under a causal mask

  bool partial() const { return triangular || columns < kBlock; }
  // The columns, rounded up to whole vectors.
  MOLEX_INLINE int64_t width() const { return round_up(columns, kPad); }
  MOLEX_INLINE int64_t seen(int64_t row) const { return triangular ? std::min(row + 1, columns) : columns; }
};

// S = soft_threshold(a) for a = k - L + u, K~ = k - S - u, and w = u + k - S. After the iteration u is w - L.
void soft_threshold(const Tokens& tokens,
                    const float* k,
                    const float* low_rank,
                    const float* u,
                    float* clean,
                    float* w,
                    float* sparse);
// x -= y.
void subtract(float* x, const float* y, int64_t count);
// Rounds `count` floats to the dtype in which products see them.
void round_through(ScalarType dtype, float* x, int64_t count);
// Copies rows of `width` floats into transposed blocks [kBlocks][width][kBlock]; the last one is padded with
// zeros.
void transpose_blocks(const float* from, int64_t rows, int64_t width, int64_t padded, float* to);
// Writes dropout's factors for `count` probabilities of a row.
void dropout_row(const Tokens& tokens, int64_t row, int64_t first_column, int64_t count, float* to);
// Writes dropout's factors for the probabilities of a block. With `transposed`, rows and columns are
// exchanged.
void dropout_block(const Tokens& tokens, int64_t first_row, int64_t first_column, bool transposed, float* to);

}  // namespace molex::rpc
