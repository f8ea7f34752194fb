// The merge of a few segments' weights on a CPU, and what the gradient of those weights sends on.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "memory.h"
#include "rows.h"

namespace {

using molex::product;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 512;  // elements of a weight that every expert contributes to in one turn

int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

const float* floats(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(),
                  "expected a contiguous float32 tensor");
  return tensor.const_data_ptr<float>();
}

// out_s = base + sum_e gates_se deltas_e for a few segments: out [G, O D], all fp32 and contiguous.
void camex_merge_cpu(const Tensor& base, const Tensor& deltas, const Tensor& gates, Tensor out) {
  const int64_t segments = gates.size(0), count = gates.size(1), size = base.numel();
  const float *start = floats(base), *from = floats(deltas), *gate = floats(gates);
  floats(out);
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, chunks_of(size), 8, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < std::min(end * kChunk, size); first += kChunk) {
      const int64_t length = std::min(kChunk, size - first);
      for (int64_t s = 0; s < segments; ++s) std::copy_n(start + first, length, to + s * size + first);
      product(gate, count, from + first, size, to + first, size, segments, length, count, true);
    }
  });
}

// What the weights' gradients dweights [G, O D] of a few segments add to those of the base and the deltas,
// and the gates' gradient <dweights_s, deltas_e> [G, E]. All fp32 and contiguous; the sums do not depend on
// the number of threads.
Tensor camex_merge_bwd_cpu(const Tensor& dweights,
                           const Tensor& deltas,
                           const Tensor& gates,
                           std::optional<Tensor> dbase,
                           std::optional<Tensor> ddeltas,
                           bool needs_gates) {
  const int64_t segments = gates.size(0), count = gates.size(1);
  const int64_t size = segments ? dweights.numel() / segments : 0, chunks = chunks_of(size);
  const float *from = floats(dweights), *with = floats(deltas), *gate = floats(gates);
  float* to_base = dbase ? dbase->mutable_data_ptr<float>() : nullptr;
  float* to_deltas = ddeltas ? ddeltas->mutable_data_ptr<float>() : nullptr;
  const int64_t pairs = needs_gates ? segments * count : 0;
  std::vector<float> partial(chunks * pairs), columns(count * segments);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t e = 0; e < count; ++e) columns[e * segments + s] = gate[s * count + e];
  }
  const std::vector<float> ones(segments, 1.0f);
  torch::stable::parallel_for(0, chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, length = std::min(kChunk, size - first);
      const float* here = from + first;
      if (to_base) product(ones.data(), 0, here, size, to_base + first, 0, 1, length, segments, true);
      if (to_deltas) {
        float* mine = to_deltas + first;
        product(columns.data(), segments, here, size, mine, size, count, length, segments, true);
      }
      if (needs_gates) {
        float* sums = &partial[chunk * pairs];
        molex::product_inner(here, size, with + first, size, sums, count, segments, count, length, false);
      }
    }
  });
  Tensor result = molex::new_result(gates, {needs_gates ? segments : 0, count}, ScalarType::Float);
  std::vector<double> sums(pairs, 0.0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < pairs; ++i) sums[i] += partial[chunk * pairs + i];
  }
  std::copy(sums.begin(), sums.end(), result.mutable_data_ptr<float>());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CPU, library) {
  library.impl("camex_merge_cpu", TORCH_BOX(&camex_merge_cpu));
  library.impl("camex_merge_bwd_cpu", TORCH_BOX(&camex_merge_bwd_cpu));
}
