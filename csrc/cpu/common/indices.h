// Ids of experts or clusters, of either integer dtype.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace molex {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Reads ids; those outside [0, limit) become `limit`.
template <typename Index>
void read_labels(const Index* ids, int64_t count, int64_t limit, std::vector<int64_t>& out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i];
    out[i] = id >= 0 && id < limit ? id : limit;
  }
}

inline std::vector<int64_t> labels_of(const Tensor& index, int64_t limit) {
  const Tensor ids = torch::stable::contiguous(index);
  std::vector<int64_t> labels(ids.numel());
  if (ids.scalar_type() == ScalarType::Long) {
    read_labels(ids.const_data_ptr<int64_t>(), ids.numel(), limit, labels);
  } else {
    STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int, "index: expected dtype int64 or int32");
    read_labels(ids.const_data_ptr<int32_t>(), ids.numel(), limit, labels);
  }
  return labels;
}

}  // namespace molex
