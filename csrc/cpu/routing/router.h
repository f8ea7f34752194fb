// The router on a CPU: what the forward and the backward pass share.
//
// Tokens are processed in pieces and a few features at a time, so that weighted tokens w x stay in the cache
// and no [T, D] tensor of them is written.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/common/indices.h"
#include "cpu/common/rows.h"

namespace molex::router {

constexpr int64_t kPiece = 96;      // tokens, a multiple of the rows of a tile of a product
constexpr int64_t kFeatures = 256;  // features of a token that are processed together
constexpr int64_t kGrain = 16384;   // elements below which a thread is not worth waking

// The number of parts of `size`, the last of which may be shorter.
inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline constexpr auto multiply =
    versions([](auto, float* to, const float* a, const float* b, int64_t count) MOLEX_LAMBDA_INLINE {
      MOLEX_INDEPENDENT
      for (int64_t i = 0; i < count; ++i) to[i] = a[i] * b[i];
    });

// Rows in memory, `stride` apart.
struct Rows {
  const float* data;
  int64_t stride;
};

// Tokens [T, D] and the weights of their features, w_tq = sum_m mix_tm W[label_tm, q]; a label outside [0, C)
// stands for a row of ones, and without W all weights are 1. Holds the tensors that it points into.
class Tokens {
 public:
  Tokens(const Tensor& x,
         const std::optional<Tensor>& table,
         const std::optional<Tensor>& labels,
         const std::optional<Tensor>& mix)
      : x_(torch::stable::contiguous(x)), from_(source_of(x_)), width_(x.size(1)) {
    if (!table || !labels) return;
    table_ = torch::stable::contiguous(*table);
    entries_ = table_->const_data_ptr<float>();
    mix_ = packed(mix);
    share_ = source_of(mix_);
    clusters_ = table->size(0), parts_ = labels->size(1);
    labels_ = labels_of(*labels, clusters_);
    ones_.assign(width_, 1.0f);
  }

  bool weighted() const { return table_.has_value(); }
  // Whether products can read x in place.
  bool plain() const { return !weighted() && from_.dtype == ScalarType::Float; }

  // Returns w x of some tokens and features, in `tile` or in x itself.
  Rows weighted_rows(int64_t first, int64_t count, int64_t feature, int64_t features, float* tile) const {
    if (plain()) return {static_cast<const float*>(from_.data) + first * width_ + feature, width_};
    std::vector<float> scratch(features);
    for (int64_t t = first; t < first + count; ++t) {
      float* to = tile + (t - first) * features;
      if (weighted()) {
        const float* token = read(from_, t * width_ + feature, features, to);
        multiply(to, token, weights(t, feature, features, scratch.data()), features);
      } else {
        read(from_, t * width_ + feature, features, to);
      }
    }
    return {tile, features};
  }

  // Returns w of one token, which may be in `scratch`. There have to be weights.
  const float* weights(int64_t t, int64_t feature, int64_t features, float* scratch) const {
    if (!share_ && parts_ == 1) return entry(t, feature);
    for (int64_t m = 0; m < parts_; ++m) {
      float spare;
      const float share = share_ ? *read(share_, t * parts_ + m, 1, &spare) : 1.0f;
      const float* row = entry(t * parts_ + m, feature);
      m == 0 ? scale_into(scratch, row, share, features) : add_scaled(scratch, row, share, features);
    }
    return scratch;
  }

 private:
  const float* entry(int64_t part, int64_t feature) const {
    const int64_t label = labels_[part];
    return label < clusters_ ? entries_ + label * width_ + feature : ones_.data();
  }

  Tensor x_;
  Source from_;
  int64_t width_, clusters_ = 0, parts_ = 0;
  std::optional<Tensor> table_, mix_;
  const float* entries_ = nullptr;
  Source share_;
  std::vector<int64_t> labels_;
  std::vector<float> ones_;
};

}  // namespace molex::router
