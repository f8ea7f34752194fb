// RPC attention between PyTorch and the kernels: tensors to parameters, device, stream, scratch.

#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cuda/rpc_attention/launch.cuh"

namespace molex::rpc {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The tensor itself where its last dimension is dense, as the kernels need it, else a copy.
inline Tensor dense(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}
inline Optional dense(const Optional& t) { return t ? Optional(dense(*t)) : std::nullopt; }
inline Optional packed(const Optional& t) {
  return t ? Optional(torch::stable::contiguous(*t)) : std::nullopt;
}

inline Tensor4 view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
inline Tensor4 view(const Optional& t) { return t ? view(*t) : Tensor4{nullptr, 0, 0, 0}; }

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat;
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "k: expected float16, bfloat16 or float32");
      return Dtype::kFloat;
  }
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The tensors that a problem points into, in the layouts that the kernels take.
struct Inputs {
  Tensor k, v;
  Optional q;
  Tensor threshold;
  Optional key_mask, seed;

  Inputs(const Tensor& keys,
         const Tensor& values,
         const Optional& queries,
         const Tensor& bound,
         const Optional& mask,
         const Optional& number)
      : k(dense(keys)),
        v(dense(values)),
        q(dense(queries)),
        threshold(torch::stable::contiguous(bound)),
        key_mask(packed(mask)),
        seed(number) {}

  Problem problem(int64_t num_iters, double scale, bool is_causal, double dropout_p) const {
    STD_TORCH_CHECK(k.dim() == 4 && k.size(3) <= kLargestWidth, "k: expected [B, H, N, d] with d <= 128");
    STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float, "threshold: expected float32");
    STD_TORCH_CHECK(dropout_p == 0.0 || seed, "seed: expected one with dropout_p");
    const bool per_row = threshold.dim() == 3;
    const int device = k.get_device_index();
    Problem p = {};
    p.dtype = dtype_of(k);
    p.batch = static_cast<int32_t>(k.size(0));
    p.heads = static_cast<int32_t>(k.size(1));
    p.length = static_cast<int32_t>(k.size(2));
    p.width = static_cast<int32_t>(k.size(3));
    p.iterations = static_cast<int32_t>(num_iters);
    p.causal = is_causal;
    p.scale = static_cast<float>(scale);
    p.k = view(k);
    p.v = view(v);
    p.q = view(q);
    p.threshold = threshold.const_data_ptr<float>();
    p.threshold_head = per_row ? k.size(2) : 1;
    p.threshold_row = per_row;
    p.key_mask = key_mask ? static_cast<const uint8_t*>(key_mask->const_data_ptr()) : nullptr;
    if (dropout_p > 0.0) {
      p.seed = seed->const_data_ptr<int64_t>();
      p.dropped = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 4294967296.0), 4294967295.0));
      p.kept_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
    }
    p.shared_limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    p.cluster_limit = attribute(cudaDevAttrClusterLaunch, device) ? 8 : 1;
    return p;
  }
};

inline Tensor scratch_of(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

inline void check_launch(cudaError_t status) {
  STD_CUDA_CHECK(status);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace molex::rpc
