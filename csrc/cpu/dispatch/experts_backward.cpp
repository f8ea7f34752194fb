// The experts' MLP on a CPU, backward. With a row's token t, weight w and activated values a:
//   dw = <w_down^T dy_t, a> + <dy_t, b_down>,  da = w w_down^T dy_t,
// so neither the experts' outputs nor their gradients are computed. Experts are processed in groups: first
// all pieces of a group's rows, in the cache, then the gradients of its weights, each over all of its rows.

#include <string>
#include <tuple>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/dispatch/activation.h"
#include "cpu/dispatch/experts.h"
#include "registration.h"

namespace {

using molex::Arena;
using molex::Matrix;
using molex::Piece;
using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGroup = 2048;  // rows of a group of experts: what they save fits in the last-level cache

struct Needs {
  bool x, weight, w_up, w_down, b_up, b_down;
};

struct Group {
  int64_t begin, end, first, rows;  // experts [begin, end) and their rows
};

// What the rows of a group save for the gradients of the weights.
struct Kept {
  Matrix upstream, acted, dpre_activation, gathered;
};

std::vector<Group> groups_of(const std::vector<int64_t>& bounds) {
  const int64_t experts = bounds.size() - 1;
  std::vector<Group> groups;
  for (int64_t e = 0; e < experts; ++e) {
    if (groups.empty() || bounds[e + 1] - groups.back().first > kGroup) {
      groups.push_back({e, e, bounds[e], 0});
    }
    groups.back().end = e + 1;
    groups.back().rows = bounds[e + 1] - groups.back().first;
  }
  return groups;
}

class Backward {
 public:
  Backward(const Tensor& dy,
           const Tensor& x,
           const Tensor& pre_activation,
           const Tensor& expert_weight,
           const Tensor& w_up,
           const Tensor& w_down,
           const std::optional<Tensor>& b_down,
           const molex::Assignments& plan,
           const molex::Activation& activation,
           const Needs& needs)
      : plan_(plan),
        activation_(activation),
        needs_(needs),
        dy_(dy),
        x_(x),
        up_(w_up),
        down_(w_down),
        pre_activation_(torch::stable::contiguous(pre_activation)),
        bias_(molex::packed(b_down)),
        dtype_(molex::products_of(x.scalar_type())),
        on_tiles_(molex::multiplies_on_tiles(x.scalar_type())),
        width_(x.size(1)),
        outer_(w_up.size(1)),
        inner_(w_down.size(2)),
        scales_(plan.rows) {
    const Tensor weights = torch::stable::contiguous(expert_weight);
    const Source from = molex::source_of(weights);
    for (int64_t row = 0; row < plan.local_rows; ++row) {
      scales_[row] = *molex::read(from, plan.permutation[row], 1, &scales_[row]);
    }
  }

  int64_t kept_bytes(int64_t rows) const {
    return Arena::bytes(rows * width_, dtype_) + Arena::bytes(rows * inner_, dtype_) +
           Arena::bytes(rows * outer_, dtype_) + Arena::bytes(needs_.w_up ? rows * width_ : 0, dtype_);
  }

  Kept kept(int64_t rows, Arena& arena) const {
    return {arena.matrix(rows, width_, dtype_),
            arena.matrix(rows, inner_, dtype_),
            arena.matrix(rows, outer_, dtype_),
            arena.matrix(needs_.w_up ? rows : 0, width_, dtype_)};
  }

  // Processes a group's rows. `dpacked` [R, D] has the dtype of products, `dweight` [T K] that of the
  // weights.
  void rows(const Group& group, const Kept& kept, const Matrix& dpacked, const Target& dweight) const {
    const bool needs_pre_activation = needs_.x || needs_.w_up || needs_.b_up;
    const bool needs_acted = needs_.weight || needs_.w_down;
    const std::vector<Piece> pieces =
        molex::pieces_of(plan_.bounds,
                         group.begin,
                         group.end,
                         on_tiles_ ? molex::tile_piece(group.rows, std::max(width_, outer_)) : molex::kPiece);
    const ScalarType sums = on_tiles_ ? ScalarType::Float : dtype_;
    const int64_t longest = molex::longest_of(pieces);
    const Source biases = molex::source_of(bias_), pre_activation = molex::source_of(pre_activation_);
    const Target acted = kept.acted.target(), dpre_activation = kept.dpre_activation.target();
    const int64_t bytes = Arena::bytes(longest * inner_, sums) + up_.bytes() + down_.bytes() +
                          2 * Arena::bytes(width_) + 2 * Arena::bytes(outer_) + 2 * Arena::bytes(inner_) +
                          Arena::bytes(molex::Activation::scratch(inner_));
    const auto work = [&](const auto& next) {
      molex::Multiplier multiply(x_.dtype());
      Arena mine(bytes);
      const Matrix products = mine.matrix(longest, inner_, sums);
      const Matrix up_scratch = up_.scratch(mine), down_scratch = down_.scratch(mine);
      float *bias_scratch = mine.floats(width_), *dy_scratch = mine.floats(width_);
      float *pre_activation_scratch = mine.floats(outer_), *dpre_activation_scratch = mine.floats(outer_);
      float *product_scratch = mine.floats(inner_), *acted_scratch = mine.floats(inner_);
      float* activation_scratch = mine.floats(molex::Activation::scratch(inner_));
      for (size_t index = next(); index < pieces.size(); index = next()) {
        const Piece& piece = pieces[index];
        const int64_t rows = piece.rows, first = piece.first - group.first;
        for (int64_t r = 0; r < rows; ++r) {
          dy_.copy(plan_.token(piece.first + r), kept.upstream.band(first + r, 1));
          if (needs_.w_up) x_.copy(plan_.token(piece.first + r), kept.gathered.band(first + r, 1));
        }
        if (!needs_pre_activation && !needs_acted) continue;
        const Matrix inner = products.band(0, rows);
        multiply(inner, kept.upstream.band(first, rows), down_.of(piece.expert, down_scratch));
        const float* bias = biases && needs_.weight
                                ? molex::read(biases, piece.expert * width_, width_, bias_scratch)
                                : nullptr;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = piece.first + r;
          float spare;
          const float* product = molex::read(inner.source(), r * inner_, inner_, product_scratch);
          float* a = molex::place(acted, (first + r) * inner_, acted_scratch);
          float* dh = molex::place(dpre_activation, (first + r) * outer_, dpre_activation_scratch);
          activation_.backward(molex::read(pre_activation, row * outer_, outer_, pre_activation_scratch),
                               product,
                               scales_[row],
                               a,
                               dh,
                               inner_,
                               activation_scratch);
          if (needs_.weight) {
            float sum = molex::dot(product, a, inner_);
            if (bias) sum += molex::dot(dy_.read(plan_.token(row), dy_scratch), bias, width_);
            const int64_t at = plan_.permutation[row];
            *molex::place(dweight, at, &spare) = sum;
            molex::write(dweight, at, 1, &sum);
          }
          molex::scale(a, scales_[row], inner_);
          molex::write(acted, (first + r) * inner_, inner_, a);
          molex::write(dpre_activation, (first + r) * outer_, outer_, dh);
        }
        if (needs_.x) {
          const Matrix up = up_.of(piece.expert, up_scratch);
          multiply(dpacked.band(piece.first, rows), kept.dpre_activation.band(first, rows), up);
        }
      }
    };
    molex::share(pieces.size(), work, !on_tiles_);
  }

  // Computes the gradients of a group's weights, some rows of a matrix at a time, and of its biases.
  void weights(const Group& group,
               const Kept& kept,
               Tensor& dw_up,
               Tensor& dw_down,
               Tensor& db_up,
               Tensor& db_down) const {
    enum class Kind { kUp, kDown, kBiasUp, kBiasDown };
    struct Task {
      Kind kind;
      Piece part;
    };
    std::vector<Task> tasks;
    int64_t tallest = 0;
    const auto plan = [&](bool needed, Kind kind, int64_t rows, int64_t columns) {
      for (int64_t e = group.begin; needed && e < group.end; ++e) {
        const int64_t depth = plan_.bounds[e + 1] - plan_.bounds[e];
        const int64_t height = on_tiles_ ? molex::tile_height(depth, rows * (group.end - group.begin))
                                         : molex::height_of(depth, columns);
        for (const Piece& part : molex::parts_of(e, 0, rows, height)) {
          tasks.push_back({kind, part});
          tallest = std::max(tallest, part.rows);
        }
      }
    };
    plan(needs_.w_down, Kind::kDown, width_, inner_);
    plan(needs_.w_up, Kind::kUp, outer_, width_);
    plan(needs_.b_down, Kind::kBiasDown, 1, 1);
    plan(needs_.b_up, Kind::kBiasUp, 1, 1);
    const bool narrows = dtype_ != x_.dtype();
    const int64_t spare = narrows ? tallest * std::max(width_, inner_) : 0;
    const auto work = [&](const auto& next) {
      molex::Multiplier multiply(x_.dtype());
      Arena scratch(Arena::bytes(spare));
      float* fp32 = scratch.floats(spare);
      for (size_t index = next(); index < tasks.size(); index = next()) {
        const Piece part = tasks[index].part;
        const int64_t first = plan_.bounds[part.expert], rows = plan_.bounds[part.expert + 1] - first;
        const auto of = [&](const Matrix& matrix) { return matrix.band(first - group.first, rows); };
        // Rows [part.first, part.first + part.rows) of stack[e] = a^T b.
        const auto product = [&](Tensor& stack, const Matrix& a, const Matrix& b) {
          const Matrix out =
              molex::matrix_of(stack, part.expert, a.columns, b.columns).band(part.first, part.rows);
          const Matrix to = narrows ? molex::matrix_of(fp32, dtype_, part.rows, b.columns) : out;
          multiply(to, of(a).transposed().band(part.first, part.rows), of(b));
          if (narrows) molex::write(out.target(), 0, part.rows * b.columns, fp32);
        };
        switch (tasks[index].kind) {
          case Kind::kDown:
            product(dw_down, kept.upstream, kept.acted);
            break;
          case Kind::kUp:
            product(dw_up, kept.dpre_activation, kept.gathered);
            break;
          case Kind::kBiasDown:
            molex::sum_rows(
                of(kept.upstream), scales_.data() + first, molex::target_of(db_down), part.expert * width_);
            break;
          case Kind::kBiasUp:
            molex::sum_rows(of(kept.dpre_activation), nullptr, molex::target_of(db_up), part.expert * outer_);
        }
      }
    };
    molex::share(tasks.size(), work, !on_tiles_);
  }

 private:
  const molex::Assignments& plan_;
  const molex::Activation& activation_;
  const Needs needs_;
  const molex::Rows dy_, x_;
  const molex::Weights up_, down_;
  const Tensor pre_activation_;
  const std::optional<Tensor> bias_;
  const ScalarType dtype_;
  const bool on_tiles_;
  const int64_t width_, outer_, inner_;
  std::vector<float> scales_;  // the weight of each row
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_mlp_bwd(const Tensor& dy,
                                                                       const Tensor& x,
                                                                       const Tensor& pre_activation,
                                                                       const Tensor& expert_weight,
                                                                       const Tensor& offsets,
                                                                       const Tensor& permutation,
                                                                       const Tensor& inverse,
                                                                       const Tensor& w_up,
                                                                       const Tensor& w_down,
                                                                       std::optional<Tensor> b_down,
                                                                       std::string activation,
                                                                       std::string layout,
                                                                       std::vector<double> numbers,
                                                                       std::vector<bool> wanted) {
  const Needs needs{wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5]};
  const int64_t experts = w_up.size(0), width = x.size(1), outer = w_up.size(1), inner = w_down.size(2);
  const ScalarType dtype = molex::products_of(x.scalar_type());
  const molex::Assignments plan(offsets, permutation, x.size(0), expert_weight.size(1));
  const molex::Activation act(activation, layout, numbers);
  const Backward backward(dy, x, pre_activation, expert_weight, w_up, w_down, b_down, plan, act, needs);

  const auto gradient = [](const Tensor& like, bool need, std::vector<int64_t> sizes) {
    return molex::new_result(like, need ? sizes : std::vector<int64_t>{0});
  };
  Tensor dx = gradient(x, needs.x, {x.size(0), width});
  Tensor dweight = needs.weight ? torch::stable::new_zeros(expert_weight, {x.size(0), expert_weight.size(1)})
                                : molex::new_result(expert_weight, {0});
  Tensor dw_up = gradient(x, needs.w_up, {experts, outer, width});
  Tensor dw_down = gradient(x, needs.w_down, {experts, width, inner});
  Tensor db_up = gradient(x, needs.b_up, {experts, outer});
  Tensor db_down = gradient(x, needs.b_down, {experts, width});
  Tensor rows = molex::new_result(x, {needs.x ? plan.rows : 0, width}, dtype);
  const Matrix dpacked = molex::matrix_of(rows.mutable_data_ptr(), dtype, rows.size(0), width);

  const std::vector<Group> groups = groups_of(plan.bounds);
  int64_t longest = 0;
  for (const Group& group : groups) longest = std::max(longest, group.rows);
  Arena arena(backward.kept_bytes(longest));
  const Kept kept = backward.kept(longest, arena);
  for (const Group& group : groups) {
    backward.rows(group, kept, dpacked, molex::target_of(dweight));
    backward.weights(group, kept, dw_up, dw_down, db_up, db_down);
  }
  if (needs.x) molex::combine(dpacked, inverse, std::nullopt, plan.local_rows, dx);
  return {dx, dweight, dw_up, dw_down, db_up, db_down};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("moe_mlp_bwd", molex::cpu_kernel<&moe_mlp_bwd>);
}
