// Grouped GEMM on a CPU. Threads share the experts' rows and, in the backward pass, the rows of their
// weights.

#include <tuple>

#include "cpu/common/memory.h"
#include "cpu/dispatch/experts.h"
#include "registration.h"

namespace {

using molex::Arena;
using molex::Matrix;
using molex::Piece;
using molex::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One thread's products, and its memory for those in another dtype than the tensors'.
class Bench {
 public:
  Bench(const molex::Weights& weight, int64_t rows, int64_t in_columns, int64_t out_columns)
      : rows_(weight.converts()     ? rows
              : weight.takes_few(1) ? std::min(rows, molex::kFewRows)
                                    : 0),
        arena_(weight.bytes() + Arena::bytes(rows_ * in_columns) + Arena::bytes(rows_ * out_columns)),
        weight(weight.scratch(arena_)),
        in(arena_.matrix(rows_, in_columns, ScalarType::Float)),
        out(arena_.matrix(rows_, out_columns, ScalarType::Float)) {
    if (molex::multiplies_on_tiles(weight.dtype())) tiles.emplace();
  }

 private:
  int64_t rows_;
  Arena arena_;

 public:
  const Matrix weight, in, out;
  std::optional<molex::TileProduct> tiles;
  molex::Multiplier blas{ScalarType::Float};
};

// A product that `multiply` writes to a matrix, fp32 where products are of another dtype than `out`, rounded
// to `out`; adds the bias to each row.
template <class Multiply>
void round_product(
    const Matrix& out, const Bench& bench, bool converts, const float* bias, const Multiply& multiply) {
  const Matrix made =
      converts ? molex::matrix_of(bench.out.data, ScalarType::Float, out.rows, out.columns) : out;
  multiply(made);
  if (!converts && !bias) return;
  std::vector<float> scratch(out.columns);
  for (int64_t r = 0; r < out.rows; ++r) {
    float* row =
        const_cast<float*>(molex::read(made.source(), r * made.row_stride, out.columns, scratch.data()));
    if (bias) molex::add(row, bias, out.columns);
    molex::write(out.target(), r * out.row_stride, out.columns, row);
  }
}

// out = a b.
void product(
    const Matrix& out, const Matrix& a, const Matrix& b, const molex::Weights& weights, Bench& bench) {
  if (bench.tiles) return (*bench.tiles)(out, a, b);
  round_product(out, bench, weights.converts(), nullptr, [&](const Matrix& made) { multiply(made, a, b); });
}

Tensor grouped_gemm_fwd(const Tensor& x,
                        const Tensor& weight,
                        const Tensor& offsets,
                        std::optional<Tensor> bias) {
  const int64_t tokens = x.size(0), width = x.size(1), columns = weight.size(1);
  Tensor y = molex::new_result(x, {tokens, columns});
  const Matrix out = molex::matrix_of(y.mutable_data_ptr(), y.scalar_type(), tokens, columns);
  const std::vector<int64_t> bounds = molex::bounds_of(offsets, tokens);
  const bool on_tiles = molex::multiplies_on_tiles(x.scalar_type());
  const std::vector<Piece> pieces = molex::pieces_of(
      bounds, 0, bounds.size() - 1, on_tiles ? molex::tile_piece(bounds.back(), width) : molex::kPiece);
  const int64_t longest = molex::longest_of(pieces);
  const molex::Rows from(x);
  const molex::Weights weights(weight);
  const std::optional<Tensor> packed = molex::packed(bias);
  const Source biases = molex::source_of(packed);
  const int64_t cuts = on_tiles ? molex::cuts_of(pieces.size()) : 1, tasks = pieces.size() * cuts;
  const auto work = [&](const auto& next) {
    Bench bench(weights, longest, width, columns);
    std::vector<float> scratch(biases ? columns : 0);
    for (int64_t task = next(); task < tasks; task = next()) {
      const auto& [expert, first, rows] = pieces[task / cuts];
      const molex::Columns part(task % cuts, cuts, columns);
      const float* const added =
          biases ? molex::read(biases, expert * columns + part.first, part.count, scratch.data()) : nullptr;
      const Matrix to = out.band(first, rows).some_columns(part.first, part.count);
      // bf16 takes few rows on tiles, too.
      const bool few = x.scalar_type() == ScalarType::Half && weights.takes_few(rows);
      if (bench.tiles && !few) {
        const Matrix weight = weights.of(expert, {}).band(part.first, part.count);
        (*bench.tiles)(to, from.band(first, rows, {}), weight.transposed(), added);
        continue;
      }
      const Matrix a = few ? from.floats(first, rows, bench.in) : from.band(first, rows, bench.in);
      round_product(to, bench, few || weights.converts(), added, [&, e = expert](const Matrix& made) {
        weights.multiply_by(bench.blas, made, a, e, bench.weight, part);
      });
    }
  };
  molex::share(tasks, work, !on_tiles);
  clear_rows(out, bounds.back());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> grouped_gemm_bwd(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& offsets, std::vector<bool> needs) {
  const int64_t tokens = x.size(0), width = x.size(1), experts = weight.size(0), columns = weight.size(1);
  const ScalarType dtype = x.scalar_type();
  const auto gradient = [&](bool need, std::vector<int64_t> sizes) {
    return molex::new_result(x, need ? sizes : std::vector<int64_t>{0});
  };
  Tensor dx = gradient(needs[0], {tokens, width});
  Tensor dweight = gradient(needs[1], {experts, columns, width});
  Tensor dbias = gradient(needs[2], {experts, columns});
  const Matrix to_x = molex::matrix_of(dx.mutable_data_ptr(), dtype, needs[0] ? tokens : 0, width);
  const std::vector<int64_t> bounds = molex::bounds_of(offsets, tokens);
  const molex::Rows upstream(dy), from(x);
  const molex::Weights weights(weight);

  enum class Kind { kX, kWeight, kBias };
  struct Task {
    Kind kind;
    Piece piece;
  };
  std::vector<Task> tasks;
  int64_t longest = 0;
  const bool on_tiles = molex::multiplies_on_tiles(dtype);
  const int64_t size = on_tiles ? molex::tile_piece(bounds.back(), columns) : molex::kPiece;
  for (int64_t e = 0; e < experts; ++e) {
    const int64_t rows = bounds[e + 1] - bounds[e];
    if (needs[0]) {
      for (const Piece& piece : molex::parts_of(e, bounds[e], rows, size)) {
        tasks.push_back({Kind::kX, piece});
      }
    }
    if (needs[1]) {
      const int64_t height =
          on_tiles ? molex::tile_height(rows, experts * columns) : molex::height_of(rows, width);
      for (const Piece& piece : molex::parts_of(e, 0, columns, height)) {
        tasks.push_back({Kind::kWeight, piece});
        longest = std::max(longest, piece.rows);
      }
    }
    if (needs[2]) tasks.push_back({Kind::kBias, {e, 0, columns}});
    longest = std::max(longest, rows);
  }
  const auto work = [&](const auto& next) {
    Bench bench(weights, longest, std::max(columns, width), std::max(columns, width));
    const Bench other(weights, needs[1] ? longest : 0, width, 0);
    for (size_t index = next(); index < tasks.size(); index = next()) {
      const auto& [kind, piece] = tasks[index];
      const auto& [expert, first, rows] = piece;
      const int64_t start = bounds[expert], count = bounds[expert + 1] - start;
      if (kind == Kind::kX) {
        product(to_x.band(first, rows),
                upstream.band(first, rows, bench.in),
                weights.of(expert, bench.weight),
                weights,
                bench);
      } else if (kind == Kind::kWeight) {
        product(molex::matrix_of(dweight, expert, columns, width).band(first, rows),
                upstream.band(start, count, bench.in).transposed().band(first, rows),
                from.band(start, count, other.in),
                weights,
                bench);
      } else {
        molex::sum_rows(
            upstream.band(start, count, bench.in), nullptr, molex::target_of(dbias), expert * columns);
      }
    }
  };
  molex::share(tasks.size(), work, !on_tiles);
  if (needs[0]) clear_rows(to_x, bounds.back());
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("grouped_gemm_fwd", molex::cpu_kernel<&grouped_gemm_fwd>);
  library.impl("grouped_gemm_bwd", molex::cpu_kernel<&grouped_gemm_bwd>);
}
