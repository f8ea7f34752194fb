// The correction of the rule Mars, row by row.

#include "cpu/momentum/correction.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/memory.h"
#include "cpu/momentum/rules.h"

namespace molex::momentum {

namespace {

// `to` may be f or g, each element of which is read before it is written.
constexpr auto combine =
    versions([](auto, float* to, const float* f, const float* f_prev, float now, float before, int64_t count)
                 MOLEX_LAMBDA_INLINE {
                   MOLEX_INDEPENDENT
                   for (int64_t i = 0; i < count; ++i) to[i] = now * f[i] - before * f_prev[i];
                 });

constexpr auto times =
    versions([](auto, float* to, const float* from, float factor, int64_t count) MOLEX_LAMBDA_INLINE {
      MOLEX_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) to[i] = factor * from[i];
    });

}  // namespace

Correction::Correction(const Tensor& f,
                       const std::optional<Tensor>& f_prev,
                       float weight,
                       int64_t sample_tokens)
    : f_(torch::stable::contiguous(f)),
      f_prev_(packed(f_prev)),
      from_f_(source_of(f_)),
      from_prev_(source_of(f_prev_)),
      now_(1.0f + weight),
      before_(weight),
      width_(f.size(1)),
      samples_(f.size(0) > 0 ? f.size(0) / sample_tokens : 0),
      sample_tokens_(sample_tokens) {}

Tensor Correction::sum_squares(const Tensor& like) {
  const int64_t rows = samples_ * sample_tokens_;
  std::vector<float> sums(rows);
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kGrain / width_), [&](int64_t begin, int64_t end) {
        Scratch scratch(2, width_);
        for (int64_t row = begin; row < end; ++row) {
          const float* f = read(from_f_, row * width_, width_, scratch[0]);
          const float* c = corrected(scratch[0], f, row, scratch[1]);
          sums[row] = dot(c, c, width_);
        }
      });
  Tensor squares = new_result(like, {samples_}, ScalarType::Float);
  for (int64_t sample = 0; sample < samples_; ++sample) {
    double sum = 0.0;
    for (int64_t i = 0; i < sample_tokens_; ++i) sum += sums[sample * sample_tokens_ + i];
    squares.mutable_data_ptr<float>()[sample] = static_cast<float>(sum);
  }
  take_squares(squares);
  return squares;
}

void Correction::take_squares(const Tensor& squares) {
  squares_ = floats_of(squares);
  inverse_norms_.clear();
  for (const float square : squares_) {
    // A NaN stays one, which a maximum would drop.
    inverse_norms_.push_back(square < 1.0f ? 1.0f : 1.0f / std::sqrt(square));
  }
}

const float* Correction::corrected(float* to, const float* f, int64_t row, float* scratch) const {
  if (from_prev_) {
    combine(to, f, read(from_prev_, row * width_, width_, scratch), now_, before_, width_);
  } else {
    times(to, f, now_, width_);
  }
  return to;
}

const float* Correction::clipped(float* to, const float* f, int64_t row, float* scratch) const {
  const float inverse = inverse_norms_[row / sample_tokens_];
  if (from_prev_) {
    const float* earlier = read(from_prev_, row * width_, width_, scratch);
    combine(to, f, earlier, now_ * inverse, before_ * inverse, width_);
  } else {
    times(to, f, now_ * inverse, width_);
  }
  return to;
}

void Correction::backward(const float* g, const std::vector<float>& products, Target df) const {
  const int64_t rows = samples_ * sample_tokens_;
  // Where the norm is above 1, c^ has length 1, and its gradient no part along it.
  std::vector<double> along(samples_);
  for (int64_t row = 0; row < rows; ++row) along[row / sample_tokens_] += products[row];
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kGrain / width_), [&](int64_t begin, int64_t end) {
        Scratch scratch(3, width_);
        for (int64_t row = begin; row < end; ++row) {
          const int64_t sample = row / sample_tokens_, first = row * width_;
          const float factor = now_ * inverse_norms_[sample];
          float* to = place(df, first, scratch[0]);
          if (squares_[sample] < 1.0f) {
            times(to, g + first, factor, width_);
          } else {
            const float* f = read(from_f_, first, width_, scratch[1]);
            const float* c = clipped(scratch[1], f, row, scratch[2]);
            combine(to, g + first, c, factor, factor * static_cast<float>(along[sample]), width_);
          }
          write(df, first, width_, to);
        }
      });
}

}  // namespace molex::momentum
