// Memory for results, and operands as floats.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "cpu/common/rows.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace molex {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Asks for huge pages where none have been touched yet. A large result is fresh memory at every call, and
// one fault per 4 KiB takes several times as long as filling it.
inline void prefer_huge_pages(Tensor& memory) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t data = reinterpret_cast<uintptr_t>(memory.mutable_data_ptr());
  const uintptr_t first = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (data + memory.numel() * memory.element_size()) / kHugePage * kHugePage;
  // This is advice: if the system ignores it, pages stay small.
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// Uninitialised memory on the device of `like`, and of its dtype unless one is given.
inline Tensor new_result(const Tensor& like,
                         torch::headeronly::IntHeaderOnlyArrayRef sizes,
                         std::optional<ScalarType> dtype = std::nullopt) {
  Tensor result = torch::stable::new_empty(like, sizes, dtype);
  prefer_huge_pages(result);
  return result;
}

// A tensor as contiguous floats; the tensor itself is used where it is contiguous fp32.
class AsFloats {
 public:
  explicit AsFloats(const Tensor& tensor) : kept_(torch::stable::contiguous(tensor)) {
    const Source source = source_of(kept_);
    if (source.dtype == ScalarType::Float) return;
    Tensor fp32 = new_result(tensor, tensor.sizes(), ScalarType::Float);
    float* to = fp32.mutable_data_ptr<float>();
    constexpr int64_t kGrain = 1 << 15;
    torch::stable::parallel_for(0, kept_.numel(), kGrain, [&](int64_t begin, int64_t end) {
      read(source, begin, end - begin, to + begin);
    });
    kept_ = fp32;
  }

  const float* data() const { return kept_.const_data_ptr<float>(); }

 private:
  Tensor kept_;
};

}  // namespace molex
