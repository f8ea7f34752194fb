// Stable counting sort of assignments by expert: counts, ends, permutation and its inverse.
//
// Three passes over fixed chunks (histogram, scan, scatter), so that the chunks run in parallel and the
// result is the same for any number of threads: a stable sort has one answer.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/common/memory.h"
#include "registration.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A sort of at most one chunk is serial: waking threads would cost more than sorting so few.
constexpr int64_t kChunk = 65536;

struct Plan {
  int32_t* counts;
  int32_t* offsets;
  int64_t* permutation;
  int64_t* inverse;
};

// Ids outside [0, num_experts) belong to no local expert and share the last bucket.
template <typename Index>
int64_t bucket_of(Index id, int64_t num_experts) {
  return id >= 0 && id < num_experts ? static_cast<int64_t>(id) : num_experts;
}

template <typename Index>
void sort_by_expert(const Index* ids, int64_t total, int64_t num_experts, const Plan& plan) {
  const int64_t buckets = num_experts + 1;
  const int64_t chunks = (total + kChunk - 1) / kChunk;
  std::vector<int64_t> next(chunks * buckets, 0);  // per chunk: histogram, then the next free row

  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* histogram = next.data() + chunk * buckets;
      const int64_t end = std::min(total, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; ++i) {
        ++histogram[bucket_of(ids[i], num_experts)];
      }
    }
  });

  int64_t row = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    const int64_t start = row;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t count = next[chunk * buckets + bucket];
      next[chunk * buckets + bucket] = row;
      row += count;
    }
    if (bucket < num_experts) {
      plan.counts[bucket] = static_cast<int32_t>(row - start);
      plan.offsets[bucket] = static_cast<int32_t>(row);
    }
  }

  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      int64_t* rows = next.data() + chunk * buckets;
      const int64_t end = std::min(total, (chunk + 1) * kChunk);
      for (int64_t i = chunk * kChunk; i < end; ++i) {
        const int64_t place = rows[bucket_of(ids[i], num_experts)]++;
        plan.permutation[place] = i;
        plan.inverse[i] = place;
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_plan(const Tensor& expert_index, int64_t num_experts) {
  const Tensor ids = torch::stable::contiguous(expert_index);
  const int64_t total = ids.numel();
  Tensor counts = molex::new_result(ids, {num_experts}, ScalarType::Int);
  Tensor offsets = molex::new_result(ids, {num_experts}, ScalarType::Int);
  Tensor permutation = molex::new_result(ids, {total}, ScalarType::Long);
  Tensor inverse = molex::new_result(ids, {total}, ScalarType::Long);
  const Plan plan{counts.mutable_data_ptr<int32_t>(),
                  offsets.mutable_data_ptr<int32_t>(),
                  permutation.mutable_data_ptr<int64_t>(),
                  inverse.mutable_data_ptr<int64_t>()};
  switch (ids.scalar_type()) {
    case ScalarType::Long:
      sort_by_expert(ids.const_data_ptr<int64_t>(), total, num_experts, plan);
      break;
    case ScalarType::Int:
      sort_by_expert(ids.const_data_ptr<int32_t>(), total, num_experts, plan);
      break;
    default:
      STD_TORCH_CHECK(false, "expert_index: expected dtype int64 or int32");
  }
  return {counts, offsets, permutation, inverse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) { library.impl("route_plan", molex::cpu_kernel<&route_plan>); }
