// Tokens in the order of their experts, and back, on a CPU.

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/dispatch/experts.h"
#include "registration.h"

namespace {

using molex::Matrix;
using molex::Source;
using molex::Target;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

int64_t grain_of(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)); }

Tensor permute_fwd(
    const Tensor& x, const Tensor& offsets, const Tensor& permutation, const Tensor& inverse, int64_t top_k) {
  (void)inverse;
  const int64_t width = x.size(1);
  const molex::Assignments plan(offsets, permutation, x.size(0), top_k);
  Tensor rows = molex::new_result(x, {plan.rows, width});
  if (width == 0) return rows;
  const molex::Rows from(x);
  const Matrix to = molex::matrix_of(rows, width);
  torch::stable::parallel_for(0, plan.local_rows, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) from.copy(plan.token(row), to.band(row, 1));
  });
  clear_rows(to, plan.local_rows);
  return rows;
}

// y_t = sum_k weight_tk rows_{inverse_tk}; without weights each row counts once.
Tensor sum_of_rows(const Tensor& rows,
                   const std::optional<Tensor>& expert_weight,
                   const Tensor& offsets,
                   const Tensor& inverse,
                   int64_t top_k) {
  Tensor packed = torch::stable::contiguous(rows);
  const int64_t count = rows.size(0), width = rows.size(1);
  Tensor y = molex::new_result(rows, {count / top_k, width});
  const int64_t local_rows = molex::bounds_of(offsets, count).back();
  molex::combine(molex::matrix_of(packed, width), inverse, expert_weight, local_rows, y);
  return y;
}

Tensor permute_bwd(const Tensor& drows,
                   const Tensor& offsets,
                   const Tensor& permutation,
                   const Tensor& inverse,
                   int64_t top_k) {
  (void)permutation;
  return sum_of_rows(drows, std::nullopt, offsets, inverse, top_k);
}

Tensor unpermute_fwd(const Tensor& rows,
                     std::optional<Tensor> kept,
                     std::optional<Tensor> expert_weight,
                     const Tensor& offsets,
                     const Tensor& permutation,
                     const Tensor& inverse,
                     int64_t top_k) {
  (void)kept;
  (void)permutation;
  return sum_of_rows(rows, expert_weight, offsets, inverse, top_k);
}

// drows_r = w_tk dy_t and dw_tk = <dy_t, rows_r>; 0 for rows of no expert.
std::tuple<Tensor, Tensor> unpermute_bwd(const Tensor& dy,
                                         std::optional<Tensor> kept,
                                         std::optional<Tensor> expert_weight,
                                         const Tensor& offsets,
                                         const Tensor& permutation,
                                         const Tensor& inverse,
                                         int64_t top_k,
                                         std::vector<bool> needs) {
  (void)inverse;
  const bool needs_rows = needs[0], needs_weight = needs[1];
  const int64_t width = dy.size(1);
  const molex::Assignments plan(offsets, permutation, dy.size(0), top_k);
  Tensor drows = needs_rows ? molex::new_result(dy, {plan.rows, width}) : molex::new_result(dy, {0});
  const Tensor& like = expert_weight ? *expert_weight : dy;
  Tensor dweight = needs_weight ? molex::new_result(like, {dy.size(0), top_k}) : molex::new_result(like, {0});
  const std::optional<Tensor> weights = molex::packed(expert_weight);
  const Source gates = molex::source_of(weights);
  const std::optional<molex::Rows> packed = needs_weight ? std::optional<molex::Rows>(*kept) : std::nullopt;
  const molex::Rows from(dy);
  const Target to_rows = molex::target_of(drows), to_weight = molex::target_of(dweight);
  torch::stable::parallel_for(0, plan.rows, grain_of(width), [&](int64_t begin, int64_t end) {
    molex::Scratch scratch(3, width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t assignment = plan.permutation[row];
      const bool is_local = row < plan.local_rows;
      const float* upstream = is_local ? from.read(plan.token(row), scratch[0]) : nullptr;
      if (needs_weight) {
        float product = is_local ? molex::dot(upstream, packed->read(row, scratch[1]), width) : 0.0f;
        *molex::place(to_weight, assignment, &product) = product;
        molex::write(to_weight, assignment, 1, &product);
      }
      if (!needs_rows) continue;
      float* out = molex::place(to_rows, row * width, scratch[2]);
      if (is_local) {
        float one = 1.0f;
        molex::scale_into(out, upstream, gates ? *molex::read(gates, assignment, 1, &one) : 1.0f, width);
      } else {
        std::fill_n(out, width, 0.0f);
      }
      molex::write(to_rows, row * width, width, out);
    }
  });
  return {drows, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("permute_fwd", molex::cpu_kernel<&permute_fwd>);
  library.impl("permute_bwd", molex::cpu_kernel<&permute_bwd>);
  library.impl("unpermute_fwd", molex::cpu_kernel<&unpermute_fwd>);
  library.impl("unpermute_bwd", molex::cpu_kernel<&unpermute_bwd>);
}
