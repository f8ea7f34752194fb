// The launchers of RPC attention for ctypes: 0, or the number of what went wrong.

#include "cuda/rpc_attention/launch.cuh"
#include "machine.h"

using namespace molex;

extern "C" {

void set_options(uint64_t seed, int kind, int number) { device::set_options({seed, kind, number}); }
void set_clusters(bool fit) { device::set_clusters(fit); }
int barrier_kinds() { return device::kKinds; }
int most_barriers(int kind) { return device::most_barriers(kind); }

int runs_on_chip(const rpc::Problem* problem) { return rpc::forward_form(*problem) != rpc::Form::kIterated; }
void on_chip_block(const rpc::Problem* problem, int* threads, int* shared_bytes) {
  rpc::with_types(*problem, [&]<class E, int D>() {
    const rpc::OnChip<E, D, false> plan(*problem);
    *threads = plan.warps * kWarp;
    *shared_bytes = plan.shared_bytes;
  });
}
int step_shared_bytes(const rpc::Problem* problem) {
  return rpc::with_types(*problem, []<class E, int D>() { return rpc::ForwardTile<E, D>::kSharedBytes; });
}
int gradient_shared_bytes(const rpc::Problem* problem) {
  return rpc::with_types(*problem, []<class E, int D>() { return rpc::BackwardTile<E, D>::kSharedBytes; });
}
int64_t forward_scratch(const rpc::Problem* problem) {
  return rpc::forward_scratch(*problem, rpc::forward_form(*problem));
}
int64_t backward_scratch(const rpc::Problem* problem) { return rpc::backward_scratch(*problem); }
int forward(const rpc::Forward* parameters) {
  return rpc::run_forward(*parameters, rpc::forward_form(parameters->problem), device::Stream{});
}
int backward(const rpc::Backward* parameters) { return rpc::run_backward(*parameters, device::Stream{}); }
}
