// The merged linear layer's backward pass on a CPU. Weights are merged, and their gradients passed on, a few
// rows at a time for a few segments: neither is ever written as a whole, and deltas are read once for a few
// segments. Operands that are not fp32 are converted as a whole, x and dy with all their segments.

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/common/gemm.h"
#include "cpu/common/matmul.h"
#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "cpu/merging/tile_backward.h"
#include "registration.h"

namespace {

using molex::Arena;
using molex::AsFloats;
using molex::product;
using molex::product_inner;
using molex::product_transposed;
using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kSegments = 4;      // segments that share what is read of the deltas
constexpr int64_t kMerged = 1 << 16;  // floats of their merged weights, which fit in the second-level cache
constexpr int64_t kTile = 1 << 13;    // floats of one segment's gradient of the weight, likewise
constexpr int64_t kRows = 6;          // rows of a tile of a product

// The floats of a result: its own memory if it is fp32, else some that are rounded into it.
class Sums {
 public:
  explicit Sums(Tensor& result)
      : to_(molex::target_of(result)),
        count_(result.numel()),
        wide_(molex::new_result(result, {to_.dtype == ScalarType::Float ? 0 : count_}, ScalarType::Float)) {}

  float* data() { return molex::place(to_, 0, wide_.mutable_data_ptr<float>()); }
  void finish() { molex::write(to_, 0, count_, data()); }

 private:
  Target to_;
  int64_t count_;
  Tensor wide_;
};

// What both passes read: dy [S, T, O], x [S, T, D], base [O, D], deltas [E, O, D] and gates [S, E].
struct Layer {
  const float *dy, *x, *base, *deltas, *gates;
  int64_t segments, tokens, columns, width, experts;

  int64_t size() const { return columns * width; }
  int64_t groups() const { return (segments + kSegments - 1) / kSegments; }
  int64_t members(int64_t group) const { return std::min(kSegments, segments - group * kSegments); }
};

// Merges the weights of a group's segments: some rows and columns of base + sum_e gates_se deltas_e.
void merge(
    const Layer& l, int64_t group, int64_t first, int64_t rows, int64_t column, int64_t columns, float* out) {
  const int64_t members = l.members(group), part = rows * columns;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (first + r) * l.width + column;
    float* row = out + r * columns;
    for (int64_t s = 0; s < members; ++s) std::copy_n(l.base + at, columns, row + s * part);
    product({l.gates + group * kSegments * l.experts,
             l.experts,
             l.deltas + at,
             l.size(),
             row,
             part,
             members,
             columns,
             l.experts,
             true});
  }
}

// dx_s = dy_s W_s.
void input_gradient(const Layer& l, const Target& to) {
  const int64_t threads = torch::stable::get_num_threads(), groups = l.groups();
  // Threads share the columns if there are too few segments to keep them busy.
  const int64_t shares = groups ? (threads + groups - 1) / groups : 1;
  // A block has whole vectors, so that a column's result does not depend on its place in the block.
  const int64_t share = ((l.width + shares - 1) / shares + molex::kWide - 1) / molex::kWide * molex::kWide;
  const int64_t block = std::min(std::max<int64_t>(share, 64), l.width);
  const int64_t blocks = (l.width + block - 1) / block;
  // The height depends on the width alone, because it decides where sums are cut.
  const int64_t height = std::max(kMerged / (kSegments * l.width) / kRows * kRows, kRows);
  const bool direct = to.dtype == ScalarType::Float;
  torch::stable::parallel_for(0, groups * blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t made = direct ? 0 : l.tokens * block;
    Arena arena(Arena::bytes(kSegments * height * block) + kSegments * Arena::bytes(made));
    float* const merged = arena.floats(kSegments * height * block);
    float* fp32[kSegments];
    for (float*& each : fp32) each = arena.floats(made);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / blocks, column = task % blocks * block;
      const int64_t columns = std::min(block, l.width - column), members = l.members(group);
      const auto out = [&](int64_t s) {
        const int64_t at = (group * kSegments + s) * l.tokens * l.width + column;
        return direct ? static_cast<float*>(to.data) + at : fp32[s];
      };
      for (int64_t first = 0; first < l.columns; first += height) {
        const int64_t rows = std::min(height, l.columns - first);
        merge(l, group, first, rows, column, columns, merged);
        for (int64_t s = 0; s < members; ++s) {
          product({l.dy + (group * kSegments + s) * l.tokens * l.columns + first,
                   l.columns,
                   merged + s * rows * columns,
                   columns,
                   out(s),
                   direct ? l.width : columns,
                   l.tokens,
                   columns,
                   rows,
                   first > 0});
        }
      }
      for (int64_t s = 0; s < members && !direct; ++s) {
        for (int64_t t = 0; t < l.tokens; ++t) {
          const int64_t at = ((group * kSegments + s) * l.tokens + t) * l.width + column;
          molex::write(to, at, columns, fp32[s] + t * columns);
        }
      }
    }
  });
}

// With dW_s = dy_s^T x_s: dbase = sum_s dW_s, ddeltas_e = sum_s gates_se dW_s and dgates_se = <dW_s,
// deltas_e>. A null pointer means that a gradient is not wanted. Sums run in the order of segments and rows.
void weight_gradients(const Layer& l, float* dbase, float* ddeltas, float* dgates) {
  const int64_t height =
      std::clamp<int64_t>(kTile / l.width / kRows * kRows, kRows, std::max(l.columns, kRows));
  const int64_t tasks = (l.columns + height - 1) / height, pairs = dgates ? l.segments * l.experts : 0;
  std::vector<float> partial(tasks * pairs), gates_transposed(l.segments * l.experts);
  for (int64_t group = 0; group < l.groups(); ++group) {
    const int64_t members = l.members(group), first = group * kSegments;
    for (int64_t s = 0; s < members; ++s) {
      for (int64_t e = 0; e < l.experts; ++e) {
        gates_transposed[first * l.experts + e * members + s] = l.gates[(first + s) * l.experts + e];
      }
    }
  }
  const std::vector<float> ones(kSegments, 1.0f);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Arena arena(Arena::bytes(kSegments * height * l.width));
    float* const tiles = arena.floats(kSegments * height * l.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * height, rows = std::min(height, l.columns - row);
      const int64_t part = rows * l.width, at = row * l.width;
      for (int64_t group = 0; group < l.groups(); ++group) {
        const int64_t members = l.members(group), first = group * kSegments;
        for (int64_t s = 0; s < members; ++s) {
          product_transposed({l.dy + (first + s) * l.tokens * l.columns + row,
                              l.columns,
                              l.x + (first + s) * l.tokens * l.width,
                              l.width,
                              tiles + s * part,
                              l.width,
                              rows,
                              l.width,
                              l.tokens,
                              false});
        }
        const bool more = group > 0;
        if (dbase) product({ones.data(), 0, tiles, part, dbase + at, 0, 1, part, members, more});
        if (ddeltas) {
          const float* gates = gates_transposed.data() + first * l.experts;
          product({gates, members, tiles, part, ddeltas + at, l.size(), l.experts, part, members, more});
        }
        if (dgates) {
          float* to = &partial[task * pairs + first * l.experts];
          product_inner(
              {tiles, part, l.deltas + at, l.size(), to, l.experts, members, l.experts, part, false});
        }
      }
    }
  });
  std::vector<double> sums(pairs, 0.0);
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < pairs; ++i) sums[i] += partial[task * pairs + i];
  }
  std::copy(sums.begin(), sums.end(), dgates);
}

// dbias_s = sum_t dy_st.
void bias_gradient(const Source& dy, int64_t segments, int64_t tokens, int64_t columns, float* to) {
  torch::stable::parallel_for(0, segments, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(columns);
    std::vector<float> scratch(columns);
    for (int64_t s = begin; s < end; ++s) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t t = 0; t < tokens; ++t) {
        const float* row = molex::read(dy, (s * tokens + t) * columns, columns, scratch.data());
        for (int64_t o = 0; o < columns; ++o) sum[o] += row[o];
      }
      std::copy(sum.begin(), sum.end(), to + s * columns);
    }
  });
}

// Gradients of x, base, deltas, gates and bias. Those not needed are empty; those of gates and bias are fp32.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> camex_linear_bwd(const Tensor& dy,
                                                                    const Tensor& x,
                                                                    const Tensor& base,
                                                                    const Tensor& deltas,
                                                                    const Tensor& gates,
                                                                    std::vector<bool> needs) {
  const auto like = [](const Tensor& tensor, bool need) {
    return need ? molex::new_result(tensor, tensor.sizes()) : molex::new_result(tensor, {0});
  };
  Tensor dx = like(x, needs[0]), dbase = like(base, needs[1]), ddeltas = like(deltas, needs[2]);
  Tensor dgates = like(gates, needs[3]);
  const int64_t segments = x.size(0), columns = base.size(0);
  Tensor dbias = needs[4] ? molex::new_result(gates, {segments, columns}) : molex::new_result(gates, {0});

  const Tensor upstream = torch::stable::contiguous(dy);
  if (needs[4]) {
    bias_gradient(molex::source_of(upstream), segments, x.size(1), columns, dbias.mutable_data_ptr<float>());
  }
  if (x.numel() == 0 || base.numel() == 0) {
    for (Tensor* result : {&dx, &dbase, &ddeltas, &dgates}) torch::stable::zero_(*result);
    return {dx, dbase, ddeltas, dgates, dbias};
  }
  const bool weighs = needs[1] || needs[2] || needs[3];
  float* const to_gates = needs[3] ? dgates.mutable_data_ptr<float>() : nullptr;
  if (x.scalar_type() == ScalarType::BFloat16 && molex::has_tiles()) {
    const Tensor rows = torch::stable::contiguous(x), start = torch::stable::contiguous(base);
    const Tensor from = torch::stable::contiguous(deltas);
    const std::vector<float> gate = molex::floats_of(gates);
    const auto bits = [](const Tensor& tensor) {
      return static_cast<const uint16_t*>(tensor.const_data_ptr());
    };
    const auto result = [](Tensor& tensor, bool need) {
      return need ? static_cast<uint16_t*>(tensor.mutable_data_ptr()) : nullptr;
    };
    const molex::merging::Backward b{bits(upstream),
                                     bits(rows),
                                     bits(start),
                                     bits(from),
                                     gate.data(),
                                     segments,
                                     x.size(1),
                                     x.size(2),
                                     columns,
                                     deltas.size(0)};
    if (needs[0]) molex::merging::input_gradient_on_tiles(b, result(dx, true));
    if (weighs) {
      molex::merging::weight_gradients_on_tiles(
          b, result(dbase, needs[1]), result(ddeltas, needs[2]), to_gates);
    }
    return {dx, dbase, ddeltas, dgates, dbias};
  }
  const AsFloats from_dy(upstream), from_x(x), from_base(base), from_deltas(deltas), from_gates(gates);
  const Layer l{from_dy.data(),
                from_x.data(),
                from_base.data(),
                from_deltas.data(),
                from_gates.data(),
                segments,
                x.size(1),
                columns,
                x.size(2),
                deltas.size(0)};
  if (needs[0]) input_gradient(l, molex::target_of(dx));
  if (weighs) {
    Sums to_base(dbase), to_deltas(ddeltas);
    weight_gradients(l, needs[1] ? to_base.data() : nullptr, needs[2] ? to_deltas.data() : nullptr, to_gates);
    to_base.finish();
    to_deltas.finish();
  }
  return {dx, dbase, ddeltas, dgates, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("camex_linear_bwd", molex::cpu_kernel<&camex_linear_bwd>);
}
