// molex::rpc_attention_bwd: see backward.cuh for what is computed.

#include <tuple>
#include <vector>

#include "cuda/rpc_attention/tensors.h"
#include "registration.h"

namespace {

using namespace molex::rpc;

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout,
                                                    Optional dsparse,
                                                    const Tensor& k,
                                                    const Tensor& v,
                                                    Optional q,
                                                    const Tensor& threshold,
                                                    Optional key_mask,
                                                    Optional seed,
                                                    const Tensor& out,
                                                    const Tensor& out_rest,
                                                    const Tensor& low_ranks,
                                                    const Tensor& stats,
                                                    int64_t num_iters,
                                                    double scale,
                                                    bool is_causal,
                                                    double dropout_p,
                                                    std::vector<bool> needs) {
  const int device = k.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Inputs inputs(k, v, q, threshold, key_mask, seed);
  Backward b = {};
  b.problem = inputs.problem(num_iters, scale, is_causal, dropout_p);

  const std::vector<int64_t> heads = {k.size(0), k.size(1), k.size(2), k.size(3)}, none = {0};
  const auto like_k = [&](bool needed) {
    return torch::stable::new_empty(k, needed ? heads : none, k.scalar_type());
  };
  Tensor dk = like_k(needs[0]), dv = like_k(needs[1]), dq = like_k(needs[2] && q);
  std::vector<int64_t> bound(inputs.threshold.sizes().begin(), inputs.threshold.sizes().end());
  Tensor dthreshold = torch::stable::new_empty(threshold, needs[3] ? bound : none, ScalarType::Float);
  if (out.numel() == 0) {
    // Without tokens a head's threshold has still a gradient: none.
    if (dthreshold.numel() != 0) torch::stable::fill_(dthreshold, 0.0);
    return {dk, dv, dq, dthreshold};
  }

  const Tensor upstream = dense(dout), state = torch::stable::contiguous(out);
  const Tensor rest = torch::stable::contiguous(out_rest);
  const Optional upstream_sparse = dense(dsparse);
  b.grad_out = view(upstream);
  b.grad_sparse = view(upstream_sparse);
  b.out = state.const_data_ptr();
  b.out_rest = rest.const_data_ptr();
  b.low_ranks = low_ranks.const_data_ptr<float>();
  b.stats = stats.const_data_ptr<float>();
  b.grad_k = needs[0] ? dk.mutable_data_ptr() : nullptr;
  b.grad_v = needs[1] ? dv.mutable_data_ptr() : nullptr;
  b.grad_q = needs[2] && q ? dq.mutable_data_ptr() : nullptr;
  b.grad_threshold = needs[3] ? dthreshold.mutable_data_ptr<float>() : nullptr;
  const BackwardForm form = backward_form(b.problem);
  Tensor scratch = scratch_of(k, backward_scratch(b.problem, form));
  b.scratch = scratch.mutable_data_ptr();
  check_launch(run_backward(b, form, current_stream(device)));
  return {dk, dv, dq, dthreshold};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(molex, CUDA, library) {
  library.impl("rpc_attention_bwd", molex::cuda_kernel<&backward>);
}
