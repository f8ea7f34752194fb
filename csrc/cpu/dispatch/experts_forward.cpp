// The experts' MLP on a CPU, forward. One thread gathers, multiplies, activates and multiplies again a piece
// of an expert's rows, in memory that stays in its cache. No expanded copy of x is made.

#include <string>
#include <tuple>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/dispatch/activation.h"
#include "cpu/dispatch/experts.h"
#include "cpu/dispatch/tile_experts.h"
#include "registration.h"

namespace {

using molex::Arena;
using molex::Layer;
using molex::Matrix;
using molex::Piece;
using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype of the products. Without a gradient it is fp32: the library has no product of 16-bit matrices
// with a result in fp32, and rounding pre-activations and rows that nobody keeps would be for nothing.
ScalarType forward_dtype(const Tensor& x, bool keeps_pre_activation) {
  if (molex::on_tiles(x.scalar_type())) return x.scalar_type();
  return keeps_pre_activation ? molex::product_dtype(x.scalar_type()) : ScalarType::Float;
}

// Writes the experts' outputs to `packed` [R, D], which has the dtype of products or of x, and the
// pre-activations to `kept` [R, H], of x's dtype, if it is given.
void run_experts(const Layer& layer,
                 const molex::Assignments& plan,
                 const Matrix& packed,
                 const Target& kept) {
  if (molex::on_tiles(layer.x.scalar_type())) return molex::experts_on_tiles(layer, plan, packed, kept);
  const molex::Rows from(layer.x);
  const ScalarType dtype = forward_dtype(layer.x, static_cast<bool>(kept));
  // Tiles take weights as they lie.
  const bool on_tiles = molex::multiplies_on_tiles(layer.x.scalar_type());
  const ScalarType weights = on_tiles ? layer.x.scalar_type() : dtype;
  const molex::Weights up(layer.w_up, weights), down(layer.w_down, weights);
  const std::optional<Tensor> biases[] = {molex::packed(layer.b_up), molex::packed(layer.b_down)};
  const Source b_up = molex::source_of(biases[0]), b_down = molex::source_of(biases[1]);
  const int64_t width = layer.x.size(1), outer = layer.w_up.size(1), inner = layer.w_down.size(2);
  const bool keeps_products = kept && kept.dtype == dtype, packs_products = packed.dtype == dtype;
  const int64_t size =
      on_tiles ? molex::tile_piece(plan.local_rows, 2 * std::max(width, inner)) : molex::kPiece;
  const std::vector<Piece> pieces = molex::pieces_of(plan.bounds, 0, plan.bounds.size() - 1, size);
  const int64_t longest = molex::longest_of(pieces);
  const int64_t bytes = Arena::bytes(longest * width, dtype) + Arena::bytes(longest * outer, dtype) +
                        Arena::bytes(longest * inner, dtype) + Arena::bytes(longest * width, dtype) +
                        up.bytes() + down.bytes() + 2 * Arena::bytes(outer) + Arena::bytes(inner) +
                        2 * Arena::bytes(width) + Arena::bytes(molex::Activation::scratch(inner));
  const auto work = [&](const auto& next) {
    molex::Multiplier multiply(layer.x.scalar_type());
    Arena arena(bytes);
    const Matrix gathered = arena.matrix(longest, width, dtype), acted = arena.matrix(longest, inner, dtype);
    const Matrix spare = arena.matrix(longest, outer, dtype), result = arena.matrix(longest, width, dtype);
    const Matrix up_scratch = up.scratch(arena), down_scratch = down.scratch(arena);
    float *row_scratch = arena.floats(outer), *bias_scratch = arena.floats(outer);
    float *acted_scratch = arena.floats(inner), *out_scratch = arena.floats(width);
    float* down_bias_scratch = arena.floats(width);
    float* activation_scratch = arena.floats(molex::Activation::scratch(inner));
    for (size_t index = next(); index < pieces.size(); index = next()) {
      const Piece& piece = pieces[index];
      const int64_t rows = piece.rows;
      for (int64_t r = 0; r < rows; ++r) from.copy(plan.token(piece.first + r), gathered.band(r, 1));

      const Matrix products =
          keeps_products ? molex::matrix_of(kept.data, dtype, plan.rows, outer).band(piece.first, rows)
                         : spare.band(0, rows);
      up.multiply_by(multiply, products, gathered.band(0, rows), piece.expert, up_scratch, {0, 1, outer});
      const float* bias = b_up ? molex::read(b_up, piece.expert * outer, outer, bias_scratch) : nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t at = (piece.first + r) * outer;
        float* row = const_cast<float*>(molex::read(products.source(), r * outer, outer, row_scratch));
        if (bias) molex::add(row, bias, outer);
        if (kept && (bias || !keeps_products)) molex::write(kept, at, outer, row);
        float* to = molex::place(acted.target(), r * inner, acted_scratch);
        layer.activation.forward(row, to, inner, activation_scratch);
        molex::write(acted.target(), r * inner, inner, to);
      }

      const Matrix out = packs_products ? packed.band(piece.first, rows) : result.band(0, rows);
      down.multiply_by(multiply, out, acted.band(0, rows), piece.expert, down_scratch, {0, 1, width});
      if (!b_down && packs_products) continue;
      bias = b_down ? molex::read(b_down, piece.expert * width, width, down_bias_scratch) : nullptr;
      for (int64_t r = 0; r < rows; ++r) {
        float* row = const_cast<float*>(molex::read(out.source(), r * width, width, out_scratch));
        if (bias) molex::add(row, bias, width);
        molex::write(packed.target(), (piece.first + r) * width, width, row);
      }
    }
  };
  molex::share(pieces.size(), work, !on_tiles);
  if (kept) clear_rows(molex::matrix_of(kept.data, kept.dtype, plan.rows, outer), plan.local_rows);
}

Tensor kept_of(const Tensor& x, int64_t rows, int64_t outer, bool keeps) {
  return molex::new_result(x, {keeps ? rows : 0, outer});
}

std::tuple<Tensor, Tensor> moe_experts_fwd(const Tensor& x,
                                           const Tensor& offsets,
                                           const Tensor& permutation,
                                           const Tensor& w_up,
                                           const Tensor& w_down,
                                           std::optional<Tensor> b_up,
                                           std::optional<Tensor> b_down,
                                           int64_t top_k,
                                           std::string activation,
                                           std::string layout,
                                           std::vector<double> numbers,
                                           bool keeps_pre_activation) {
  const molex::Assignments plan(offsets, permutation, x.size(0), top_k);
  Tensor kept = kept_of(x, plan.rows, w_up.size(1), keeps_pre_activation);
  Tensor packed = molex::new_result(x, {plan.rows, x.size(1)});
  const Matrix rows = molex::matrix_of(packed.mutable_data_ptr(), x.scalar_type(), plan.rows, x.size(1));
  run_experts({x, w_up, w_down, b_up, b_down, {activation, layout, numbers}},
              plan,
              rows,
              keeps_pre_activation ? molex::target_of(kept) : Target{});
  clear_rows(rows, plan.local_rows);
  return {packed, kept};
}

std::tuple<Tensor, Tensor> moe_mlp_fwd(const Tensor& x,
                                       const Tensor& expert_weight,
                                       const Tensor& offsets,
                                       const Tensor& permutation,
                                       const Tensor& inverse,
                                       const Tensor& w_up,
                                       const Tensor& w_down,
                                       std::optional<Tensor> b_up,
                                       std::optional<Tensor> b_down,
                                       std::string activation,
                                       std::string layout,
                                       std::vector<double> numbers,
                                       bool keeps_pre_activation) {
  const molex::Assignments plan(offsets, permutation, x.size(0), expert_weight.size(1));
  Tensor kept = kept_of(x, plan.rows, w_up.size(1), keeps_pre_activation);
  Tensor packed = molex::new_result(x, {plan.rows, x.size(1)}, forward_dtype(x, keeps_pre_activation));
  const Matrix rows = molex::matrix_of(packed.mutable_data_ptr(), packed.scalar_type(), plan.rows, x.size(1));
  run_experts({x, w_up, w_down, b_up, b_down, {activation, layout, numbers}},
              plan,
              rows,
              keeps_pre_activation ? molex::target_of(kept) : Target{});
  Tensor y = molex::new_result(x, {x.size(0), x.size(1)});
  molex::combine(rows, inverse, expert_weight, plan.local_rows, y);
  return {y, kept};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("moe_experts", molex::cpu_kernel<&moe_experts_fwd>);
  library.impl("moe_mlp_fwd", molex::cpu_kernel<&moe_mlp_fwd>);
}
