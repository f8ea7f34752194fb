// What the passes of the dispatch ops share: which rows belong to which expert, and access to weights and
// rows.

#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/common/few_rows.h"
#include "cpu/common/tile_product.h"

namespace molex {

// The dtype of what is kept between products: bf16 where they take it.
inline ScalarType products_of(ScalarType dtype) { return on_tiles(dtype) ? dtype : product_dtype(dtype); }

// The dtype in which products read tensors: on tiles their own.
inline ScalarType operands_of(ScalarType dtype) {
  return multiplies_on_tiles(dtype) ? dtype : product_dtype(dtype);
}

// Returns 0 and the end of each expert's rows. Ends outside [0, num_rows] are clamped.
inline std::vector<int64_t> bounds_of(const Tensor& offsets, int64_t num_rows) {
  const Tensor ends = torch::stable::contiguous(offsets);
  const int32_t* from = ends.const_data_ptr<int32_t>();
  std::vector<int64_t> bounds(ends.numel() + 1, 0);
  for (int64_t e = 0; e < ends.numel(); ++e) {
    bounds[e + 1] = std::min(std::max<int64_t>(from[e], bounds[e]), num_rows);
  }
  return bounds;
}

constexpr int64_t kHalfCache = 1 << 19;  // elements of 16 bits: half of the second-level cache

// The rows of a piece whose products run on tiles: what is packed of a weight serves more of them, as long as
// there are two pieces a thread, and the rows, of up to `columns`, take half of the second-level cache.
inline int64_t tile_piece(int64_t rows, int64_t columns) {
  constexpr int64_t kLeast = 64, kMost = 384;
  const int64_t most = std::clamp(kHalfCache / std::max<int64_t>(columns, 1), kLeast, kMost);
  return std::clamp(rows / (2 * torch::stable::get_num_threads()), kLeast, most);
}

// In how many parts products of each piece are cut on tiles: two for every thread in all.
inline int64_t cuts_of(int64_t pieces) {
  const int64_t threads = torch::stable::get_num_threads();
  return threads == 1 || pieces == 0 ? 1 : parts(2 * threads, pieces);
}

// Columns [first, first + count) of part `index` of `cuts`, whole tiles but for the last.
struct Columns {
  Columns(int64_t index, int64_t cuts, int64_t columns) {
    const int64_t strips = parts(columns, kDeep);
    first = index * strips / cuts * kDeep;
    count = std::min((index + 1) * strips / cuts * kDeep, columns) - first;
  }

  int64_t first, count;
};

// The rows of experts [begin, end).
inline std::vector<Piece> pieces_of(const std::vector<int64_t>& bounds,
                                    int64_t begin,
                                    int64_t end,
                                    int64_t size = kPiece) {
  std::vector<Piece> pieces;
  for (int64_t e = begin; e < end; ++e) {
    for (const Piece& piece : parts_of(e, bounds[e], bounds[e + 1] - bounds[e], size)) {
      pieces.push_back(piece);
    }
  }
  return pieces;
}

// The number of rows of a weight's gradient that are one task: more rows if the sum behind each element is
// short.
inline int64_t height_of(int64_t depth, int64_t columns) {
  constexpr int64_t kProducts = 1 << 24;
  return std::max(kPiece, kProducts / std::max<int64_t>(depth * columns, 1));
}

// The same for products on tiles: what is packed of the other operand serves all rows of a task, and those,
// of `depth` elements, take half of the second-level cache. `all` is the number of rows of all gradients.
inline int64_t tile_height(int64_t depth, int64_t all) {
  const int64_t most = std::max(kPiece, all / (2 * torch::stable::get_num_threads()));
  return std::clamp(kHalfCache / std::max<int64_t>(depth, 1), kPiece, most);
}

inline int64_t longest_of(const std::vector<Piece>& pieces) {
  int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.rows);
  return longest;
}

// One matrix per expert, with any strides.
class Weights {
 public:
  explicit Weights(const Tensor& stack) : Weights(stack, operands_of(stack.scalar_type())) {}

  // `products` is the dtype in which the matrices are multiplied.
  Weights(const Tensor& stack, ScalarType products)
      : source_(stack.const_data_ptr(), stack.scalar_type()),
        products_(products),
        rows_(stack.size(1)),
        columns_(stack.size(2)),
        strides_{stack.stride(0), stack.stride(1), stack.stride(2)} {}

  ScalarType dtype() const { return source_.dtype; }

  // Whether products read fp32 copies, also of a matrix without elements.
  bool converts() const { return source_.dtype != products_; }

  // The bytes that `of` needs in an arena.
  int64_t bytes() const { return converts() ? Arena::bytes(rows_ * columns_) : 0; }

  // The expert's matrix as products read it: its own memory, or a copy in `scratch` if it has to be converted
  // to fp32.
  Matrix of(int64_t expert, const Matrix& scratch) const {
    if (!converts()) return at(expert);
    return in_floats(at(expert), scratch.data);
  }

  // Whether so many rows, as floats, are multiplied by numbers of 16 bits as they lie.
  bool takes_few(int64_t rows) const {
    return source_.dtype != ScalarType::Float && strides_[2] == 1 && are_few(rows, columns_);
  }

  // out = a w^T, with some rows of the expert's matrix w.
  void multiply_by(Multiplier& multiply,
                   const Matrix& out,
                   const Matrix& a,
                   int64_t expert,
                   const Matrix& scratch,
                   const Columns& part) const {
    if (a.dtype == ScalarType::Float && takes_few(a.rows)) {
      return multiply_few(out, a, at(expert).band(part.first, part.count));
    }
    multiply(out, a, of(expert, scratch).band(part.first, part.count).transposed());
  }

  Matrix scratch(Arena& arena) const {
    return converts() ? arena.matrix(rows_, columns_, ScalarType::Float) : Matrix{};
  }

 private:
  Matrix at(int64_t expert) const {
    char* data = static_cast<char*>(const_cast<void*>(source_.data));
    data += expert * strides_[0] * size_of(source_.dtype);
    return {data, source_.dtype, rows_, columns_, strides_[1], strides_[2]};
  }

  Source source_;
  ScalarType products_;
  int64_t rows_, columns_, strides_[3];
};

// The expert's part of a gradient of stacked weights.
inline Matrix matrix_of(Tensor& stack, int64_t expert, int64_t rows, int64_t columns) {
  char* data = static_cast<char*>(stack.mutable_data_ptr());
  const ScalarType dtype = stack.scalar_type();
  return matrix_of(data + expert * rows * columns * size_of(dtype), dtype, rows, columns);
}

// Rows of a matrix, any distance apart. They are copied only if their elements are not contiguous.
class Rows {
 public:
  explicit Rows(const Tensor& tensor)
      : kept_(tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor)),
        source_(source_of(kept_)),
        width_(kept_.size(1)),
        stride_(kept_.stride(0)) {}

  ScalarType dtype() const { return source_.dtype; }

  // Row `index` as floats.
  const float* read(int64_t index, float* scratch) const {
    return molex::read(source_, index * stride_, width_, scratch);
  }

  // Copies row `index` into a row of a matrix that products read.
  void copy(int64_t index, const Matrix& to) const {
    if (to.dtype == source_.dtype) {
      const char* from = static_cast<const char*>(source_.data) + index * stride_ * size_of(to.dtype);
      std::memcpy(to.data, from, width_ * size_of(to.dtype));
    } else {
      molex::read(source_, index * stride_, width_, static_cast<float*>(to.data));
    }
  }

  // Rows [first, first + count) as products read them: own memory, or a copy in `scratch` converted to fp32.
  Matrix band(int64_t first, int64_t count, const Matrix& scratch) const {
    if (source_.dtype == operands_of(source_.dtype)) {
      char* start = static_cast<char*>(const_cast<void*>(source_.data));
      return Matrix{start, source_.dtype, kept_.size(0), width_, stride_}.band(first, count);
    }
    return floats(first, count, scratch);
  }

  // Rows [first, first + count) in a copy in `scratch`.
  Matrix floats(int64_t first, int64_t count, const Matrix& scratch) const {
    const Matrix fp32 = matrix_of(scratch.data, ScalarType::Float, count, width_);
    for (int64_t row = 0; row < count; ++row) copy(first + row, fp32.band(row, 1));
    return fp32;
  }

 private:
  Tensor kept_;
  Source source_;
  int64_t width_, stride_;
};

// Sorted assignments: row r holds token permutation[r] / K, and token t's rows are inverse[t K + k]. Only
// rows below `local_rows` belong to one of the local experts.
struct Assignments {
  Assignments(const Tensor& offsets, const Tensor& permutation_, int64_t tokens, int64_t top_k_)
      : bounds(bounds_of(offsets, permutation_.numel())),
        kept(torch::stable::contiguous(permutation_)),
        permutation(kept.const_data_ptr<int64_t>()),
        rows(kept.numel()),
        local_rows(bounds.back()),
        top_k(top_k_) {
    check(permutation, rows, tokens * top_k, "plan.permutation");
  }

  int64_t token(int64_t row) const { return permutation[row] / top_k; }

  // Checks that a plan made for other assignments does not lead outside the tensors.
  static void check(const int64_t* values, int64_t count, int64_t limit, const char* name) {
    bool inside = true;
    for (int64_t i = 0; i < count; ++i) inside &= values[i] >= 0 && values[i] < limit;
    STD_TORCH_CHECK(inside, name, ": expected values in [0, ", limit, "), got others: not this call's plan");
  }

  std::vector<int64_t> bounds;
  Tensor kept;
  const int64_t* permutation;
  int64_t rows, local_rows, top_k;
};

// y_t = sum_k weight_tk packed[inverse_tk], in fp32 and in the order of k. Without weights each counts 1.
void combine(const Matrix& packed,
             const Tensor& inverse,
             const std::optional<Tensor>& expert_weight,
             int64_t local_rows,
             Tensor& out);

// to[first + i] = sum_r scales_r rows_ri. Without scales each row counts 1.
void sum_rows(const Matrix& rows, const float* scales, const Target& to, int64_t first);

}  // namespace molex
