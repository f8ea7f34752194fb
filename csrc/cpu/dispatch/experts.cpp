// Stages that both passes of the dispatch ops share: sums over a token's rows and over an expert's rows.

#include "cpu/dispatch/experts.h"

#include "cpu/common/elements.h"

namespace molex {

namespace {

constexpr int64_t kGrain = 8192;  // elements below which a thread is not worth waking

constexpr auto add_in_double =
    versions([](auto, double* to, const float* from, double scale, int64_t count) MOLEX_LAMBDA_INLINE {
      for (int64_t i = 0; i < count; ++i) to[i] += scale * from[i];
    });

// to_i = sum_k weights_k rows_ki, in the order of k, in the registers of one pass.
template <class From, class To>
constexpr auto weigh = versions(
    [](auto registers, const From* const* rows, const float* weights, int64_t count, To* to, int64_t width)
        MOLEX_LAMBDA_INLINE {
          constexpr int kLanes = std::min(lanes_of<From>(registers), lanes_of<To>(registers));
          for_elements<kLanes>(width, [&](auto lanes, int64_t i) MOLEX_LAMBDA_INLINE {
            Lanes<lanes> sum = {};
            for (int64_t k = 0; k < count; ++k) {
              const Lanes<lanes> row = load_elements<lanes>(registers, rows[k] + i);
              sum = k == 0 ? weights[k] * row : sum + weights[k] * row;
            }
            store_elements<lanes>(registers, to + i, sum);
          });
        });

// Rows from `local_rows` on are of no local expert.
template <class From, class To>
void combine_as(const Matrix& packed,
                const int64_t* row_of,
                int64_t top_k,
                const Source& gates,
                int64_t local_rows,
                Tensor& out) {
  const int64_t width = out.size(1),
                grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width * top_k));
  const From* const from = static_cast<const From*>(packed.data);
  To* const to = static_cast<To*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, out.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<const From*> rows(top_k);
    std::vector<float> weights(top_k), scratch(top_k, 1.0f);
    for (int64_t t = begin; t < end; ++t) {
      const float* const given = gates ? read(gates, t * top_k, top_k, scratch.data()) : scratch.data();
      int64_t count = 0;
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t row = row_of[t * top_k + k];
        if (row >= local_rows) continue;
        rows[count] = from + row * width;
        weights[count++] = given[k];
      }
      weigh<From, To>(rows.data(), weights.data(), count, to + t * width, width);
    }
  });
}

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
  // Rows have the dtype of the result or are fp32.
  by_dtype(out.scalar_type(), [&]<class To>(To) {
    packed.dtype == ScalarType::Float
        ? combine_as<float, To>(packed, row_of, top_k, source_of(weights), local_rows, out)
        : combine_as<To, To>(packed, row_of, top_k, source_of(weights), local_rows, out);
  });
}

}  // namespace molex
