// The launchers of RPC attention for ctypes: 0, or the number of what went wrong.

#include "cuda/rpc_attention/launch.cuh"
#include "machine.h"

using namespace molex;

extern "C" {

void set_options(uint64_t seed, int left_out_barrier) { device::set_options({seed, left_out_barrier}); }
int most_barriers() { return device::most_barriers(); }

int runs_on_chip(const rpc::Problem* problem) { return rpc::runs_on_chip(*problem); }
int step_shared_bytes(const rpc::Problem* problem) {
  return rpc::with_types(*problem, []<class E, int D>() { return rpc::StepTile<E, D>::kSharedBytes; });
}
int gradient_shared_bytes(const rpc::Problem* problem) {
  return rpc::with_types(*problem, []<class E, int D>() { return rpc::GradientTile<E, D>::kSharedBytes; });
}
int64_t forward_scratch(const rpc::Problem* problem) { return rpc::forward_scratch(*problem); }
int64_t backward_scratch(const rpc::Problem* problem) { return rpc::backward_scratch(*problem); }
int forward(const rpc::Forward* parameters) { return rpc::run_forward(*parameters, device::Stream{}); }
int backward(const rpc::Backward* parameters) { return rpc::run_backward(*parameters, device::Stream{}); }
}
