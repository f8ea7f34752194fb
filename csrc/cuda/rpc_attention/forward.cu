// molex::rpc_attention_fwd: see launch.cuh for what is computed.

#include <tuple>
#include <vector>

#include "cuda/rpc_attention/tensors.h"
#include "registration.h"

namespace {

using namespace molex::rpc;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& k,
                                                           const Tensor& v,
                                                           Optional q,
                                                           const Tensor& threshold,
                                                           Optional key_mask,
                                                           Optional seed,
                                                           int64_t num_iters,
                                                           double scale,
                                                           bool is_causal,
                                                           double dropout_p,
                                                           bool keeps_state,
                                                           bool returns_sparse) {
  const int device = k.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Inputs inputs(k, v, q, threshold, key_mask, seed);
  Forward f = {};
  f.problem = inputs.problem(num_iters, scale, is_causal, dropout_p);

  const int64_t B = k.size(0), H = k.size(1), N = k.size(2), d = k.size(3);
  const std::vector<int64_t> heads = {B, H, N, d}, none = {0};
  const std::vector<int64_t> states = {num_iters - 1, B, H, N, d}, rows = {num_iters, 2, B, H, N};
  const auto allocate = [&](const std::vector<int64_t>& size, ScalarType dtype) {
    return torch::stable::new_empty(k, size, dtype);
  };
  Tensor out = allocate(heads, k.scalar_type());
  Tensor sparse = allocate(returns_sparse ? heads : none, ScalarType::Float);
  const bool keeps_rest = keeps_state && k.scalar_type() != ScalarType::Float;
  Tensor out_rest = allocate(keeps_rest ? heads : none, k.scalar_type());
  Tensor low_ranks = allocate(keeps_state ? states : none, ScalarType::Float);
  Tensor stats = allocate(keeps_state ? rows : none, ScalarType::Float);
  if (out.numel() == 0) return {out, sparse, out_rest, low_ranks, stats};

  f.out = out.mutable_data_ptr();
  f.sparse = returns_sparse ? sparse.mutable_data_ptr<float>() : nullptr;
  f.out_rest = keeps_rest ? out_rest.mutable_data_ptr() : nullptr;
  f.low_ranks = keeps_state ? low_ranks.mutable_data_ptr<float>() : nullptr;
  f.stats = keeps_state ? stats.mutable_data_ptr<float>() : nullptr;
  const Form form = forward_form(f.problem);
  Tensor scratch = scratch_of(k, forward_scratch(f.problem, form));
  f.scratch = scratch.mutable_data_ptr();
  check_launch(run_forward(f, form, current_stream(device)));
  return {out, sparse, out_rest, low_ranks, stats};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CUDA, library) {
  library.impl("rpc_attention_fwd", molex::cuda_kernel<&forward>);
}
