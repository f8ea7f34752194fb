// The launchers of RPC attention as a Python module. Pointers are numbers in Python, 0 where there is none.

#include <pybind11/pybind11.h>

#include "cuda/rpc_attention/launch.cuh"
#include "machine.h"

namespace py = pybind11;
using namespace molex;

namespace {

template <class Owner, class Pointer>
void pointer(py::class_<Owner>& to, const char* name, Pointer* Owner::* member) {
  to.def_property(
      name,
      [member](const Owner& owner) { return reinterpret_cast<uintptr_t>(owner.*member); },
      [member](Owner& owner, uintptr_t address) { owner.*member = reinterpret_cast<Pointer*>(address); });
}

void bind_tensor(py::module_& module) {
  py::class_<rpc::Tensor4> bound(module, "Tensor4");
  bound.def(py::init([] { return rpc::Tensor4{}; }));
  pointer(bound, "data", &rpc::Tensor4::data);
  bound.def_readwrite("batch", &rpc::Tensor4::batch)
      .def_readwrite("head", &rpc::Tensor4::head)
      .def_readwrite("row", &rpc::Tensor4::row);
}

void bind_problem(py::module_& module) {
  using rpc::Problem;
  py::class_<Problem> bound(module, "Problem");
  bound.def(py::init([] { return Problem{}; }))
      .def_property(
          "dtype",
          [](const Problem& problem) { return static_cast<int>(problem.dtype); },
          [](Problem& problem, int dtype) { problem.dtype = static_cast<rpc::Dtype>(dtype); })
      .def_readwrite("batch", &Problem::batch)
      .def_readwrite("heads", &Problem::heads)
      .def_readwrite("length", &Problem::length)
      .def_readwrite("width", &Problem::width)
      .def_readwrite("iterations", &Problem::iterations)
      .def_readwrite("causal", &Problem::causal)
      .def_readwrite("scale", &Problem::scale)
      .def_readwrite("k", &Problem::k)
      .def_readwrite("v", &Problem::v)
      .def_readwrite("q", &Problem::q)
      .def_readwrite("threshold_head", &Problem::threshold_head)
      .def_readwrite("threshold_row", &Problem::threshold_row)
      .def_readwrite("dropped", &Problem::dropped)
      .def_readwrite("kept_scale", &Problem::kept_scale)
      .def_readwrite("shared_limit", &Problem::shared_limit)
      .def_readwrite("cluster_limit", &Problem::cluster_limit);
  pointer(bound, "threshold", &Problem::threshold);
  pointer(bound, "key_mask", &Problem::key_mask);
  pointer(bound, "seed", &Problem::seed);
}

void bind_passes(py::module_& module) {
  using rpc::Backward, rpc::Forward;
  py::class_<Forward> forward(module, "Forward");
  forward.def(py::init([] { return Forward{}; })).def_readwrite("problem", &Forward::problem);
  pointer(forward, "out", &Forward::out);
  pointer(forward, "sparse", &Forward::sparse);
  pointer(forward, "out_rest", &Forward::out_rest);
  pointer(forward, "low_ranks", &Forward::low_ranks);
  pointer(forward, "stats", &Forward::stats);
  pointer(forward, "scratch", &Forward::scratch);

  py::class_<Backward> backward(module, "Backward");
  backward.def(py::init([] { return Backward{}; }))
      .def_readwrite("problem", &Backward::problem)
      .def_readwrite("grad_out", &Backward::grad_out)
      .def_readwrite("grad_sparse", &Backward::grad_sparse);
  pointer(backward, "out", &Backward::out);
  pointer(backward, "out_rest", &Backward::out_rest);
  pointer(backward, "low_ranks", &Backward::low_ranks);
  pointer(backward, "stats", &Backward::stats);
  pointer(backward, "grad_k", &Backward::grad_k);
  pointer(backward, "grad_v", &Backward::grad_v);
  pointer(backward, "grad_q", &Backward::grad_q);
  pointer(backward, "grad_threshold", &Backward::grad_threshold);
  pointer(backward, "scratch", &Backward::scratch);
}

py::tuple on_chip_block(const rpc::Problem& problem) {
  return rpc::with_types(problem, [&]<class E, int D>() {
    const rpc::OnChip<E, D, false> plan(problem);
    return py::make_tuple(plan.warps * kWarp, plan.shared_bytes);
  });
}

py::tuple gradient_block(const rpc::Problem& problem) {
  return rpc::with_groups<device::BFloat, 64>(problem, [&]<int Groups, bool HasQ>() {
    const rpc::BackwardOnChip<device::BFloat, 64, Groups, HasQ> plan(problem);
    return py::make_tuple(plan.kThreads, plan.shared_bytes);
  });
}

}  // namespace

PYBIND11_MODULE(rpc_attention, module) {
  bind_tensor(module);
  bind_problem(module);
  bind_passes(module);

  module.attr("barrier_kinds") = static_cast<int>(device::kKinds);
  module.def("set_options",
             [](uint64_t seed, int kind, int number) { device::set_options({seed, kind, number}); });
  module.def("set_clusters", &device::set_clusters);
  module.def("set_warp_groups", &device::set_warp_groups);
  module.def("most_barriers", &device::most_barriers);

  module.def("runs_on_chip",
             [](const rpc::Problem& p) { return rpc::forward_form(p) != rpc::Form::kIterated; });
  module.def("runs_in_warp_groups",
             [](const rpc::Problem& p) { return rpc::forward_form(p) == rpc::Form::kWarpGroups; });
  module.def("on_chip_block", &on_chip_block);
  module.def("step_shared_bytes", [](const rpc::Problem& problem) {
    return rpc::with_types(problem,
                           []<class E, int D>() { return int{rpc::ForwardTile<E, D>::kSharedBytes}; });
  });
  module.def("gradient_shared_bytes", [](const rpc::Problem& problem) {
    return rpc::with_types(problem,
                           []<class E, int D>() { return int{rpc::BackwardTile<E, D>::kSharedBytes}; });
  });
  module.def("forward_scratch",
             [](const rpc::Problem& p) { return rpc::forward_scratch(p, rpc::forward_form(p)); });
  module.def("gradient_is_on_chip",
             [](const rpc::Problem& p) { return rpc::backward_form(p) == rpc::BackwardForm::kOnChip; });
  module.def("gradient_block", &gradient_block);
  module.def("backward_scratch",
             [](const rpc::Problem& p) { return rpc::backward_scratch(p, rpc::backward_form(p)); });
  // Of both passes: 0, or the number of what went wrong.
  module.def("forward", [](const rpc::Forward& parameters) {
    return static_cast<int>(
        rpc::run_forward(parameters, rpc::forward_form(parameters.problem), device::Stream{}));
  });
  module.def("backward", [](const rpc::Backward& parameters) {
    return static_cast<int>(
        rpc::run_backward(parameters, rpc::backward_form(parameters.problem), device::Stream{}));
  });
}
