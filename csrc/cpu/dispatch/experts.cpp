// Stages that both passes of the dispatch ops share: sums over a token's rows and over an expert's rows.

#include "cpu/dispatch/experts.h"

namespace molex {

namespace {

constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

constexpr auto add_in_double =
    versions([](auto, double* to, const float* from, double scale, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) to[i] += scale * from[i];
    });

}  // namespace

void sum_rows(const Matrix& rows, const float* scales, const Target& to, int64_t first) {
  std::vector<double> sums(rows.columns, 0.0);
  std::vector<float> scratch(rows.columns), spare(rows.columns);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const float* from = read(rows.source(), row * rows.row_stride, rows.columns, scratch.data());
    add_in_double(sums.data(), from, scales ? scales[row] : 1.0, rows.columns);
  }
  float* out = place(to, first, spare.data());
  std::copy(sums.begin(), sums.end(), out);
  write(to, first, rows.columns, out);
}

void combine(const Matrix& packed,
             const Tensor& inverse,
             const std::optional<Tensor>& expert_weight,
             int64_t local_rows,
             Tensor& out) {
  const int64_t tokens = out.size(0), width = out.size(1);
  if (tokens == 0 || width == 0) return;
  const Tensor rows = torch::stable::contiguous(inverse);
  const int64_t* row_of = rows.const_data_ptr<int64_t>();
  const int64_t top_k = rows.numel() / tokens;
  Assignments::check(row_of, rows.numel(), packed.rows, "plan.inverse");
  const std::optional<Tensor> weights = molex::packed(expert_weight);
  const Source gates = source_of(weights), from = packed.source();
  const Target to = target_of(out);
  const int64_t grain = std::max<int64_t>(1, kGrain / (width * top_k));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t begin, int64_t end) {
    Arena arena(2 * Arena::bytes(width));
    float *scratch = arena.floats(width), *spare = arena.floats(width);
    for (int64_t t = begin; t < end; ++t) {
      float* sum = place(to, t * width, spare);
      bool any = false;
      for (int64_t k = t * top_k; k < (t + 1) * top_k; ++k) {
        if (row_of[k] >= local_rows) continue;
        float one = 1.0f;
        const float weight = gates ? *read(gates, k, 1, &one) : 1.0f;
        const float* row = read(from, row_of[k] * width, width, scratch);
        any ? add_scaled(sum, row, weight, width) : scale_into(sum, row, weight, width);
        any = true;
      }
      if (!any) std::fill_n(sum, width, 0.0f);
      write(to, t * width, width, sum);
    }
  });
}

}  // namespace molex
