// RPC attention, a method of robust attention (arXiv 2406.13762), in its scaled dual. For each head,
// with L = u = 0 at first and for every t of n iterations,
//   a = k - L + u ;  S = 0 where |a| < T, else a - sign(a) T ;  K~ = k - S - u
//   L = softmax(scale * (q or K~) K~^T) v ;  u = u + k - L - S
// The result is L. While an attention runs, of the state only w = u + k - S is needed: u' = w - L'.
//
// No Torch header is included here or below. The caller fills the parameters, gives scratch memory of
// the size that it is told, and launches on its stream; nothing waits for the device.

#pragma once

#include "cuda/rpc_attention/backward.cuh"
#include "cuda/rpc_attention/forward.cuh"

namespace molex::rpc {

constexpr int kLargestWidth = 128;

template <class E, class Function>
auto with_width(int width, const Function& function) {
  if (width <= 16) return function.template operator()<E, 16>();
  if (width <= 32) return function.template operator()<E, 32>();
  if (width <= 64) return function.template operator()<E, 64>();
  return function.template operator()<E, kLargestWidth>();
}

// Calls `function<E, D>()` for the element type and the padded width.
template <class Function>
auto with_types(const Problem& p, const Function& function) {
  switch (p.dtype) {
    case Dtype::kHalf:
      return with_width<device::Half>(p.width, function);
    case Dtype::kBFloat:
      return with_width<device::BFloat>(p.width, function);
    default:
      return with_width<float>(p.width, function);
  }
}

inline bool runs_on_chip(const Problem& p) {
  return with_types(p, [&]<class E, int D>() { return OnChip<E, D>(p).fits; });
}

inline int64_t forward_scratch(const Problem& p) {
  return with_types(p, [&]<class E, int D>() {
    return OnChip<E, D>(p).fits ? int64_t{0} : ForwardScratch<E>(p, nullptr, D).bytes;
  });
}

inline int64_t backward_scratch(const Problem& p) {
  return with_types(p, [&]<class E, int D>() { return BackwardScratch<E>(p, nullptr, D).bytes; });
}

inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Templates, so that a translation unit compiles the kernels of the pass that it calls and no others.
template <class Stream>
device::Status run_forward(const Forward& f, Stream stream) {
  const Problem& p = f.problem;
  return with_types(p, [&]<class E, int D>() {
    if (const OnChip<E, D> plan(p); plan.fits) {
      const device::Grid grid{
          p.all_heads() * plan.cluster, plan.warps * kWarp, plan.shared_bytes, plan.cluster};
      return device::launch(on_chip<E, D>, grid, OnChipForward<E, D>{f, plan}, stream);
    }
    const int64_t elements = p.all_heads() * padded_rows(p) * D;
    const ForwardScratch<E> scratch(p, f.scratch, D);
    device::Status status = device::launch(prepare<E, D>,
                                           {blocks_for(elements, kPrepareThreads), kPrepareThreads},
                                           ForwardStep<E>(f, scratch, -1),
                                           stream);
    using T = StepTile<E, D>;
    const device::Grid grid{
        p.all_heads() * blocks_for(p.length, T::kRows), T::kWarps * kWarp, T::kSharedBytes};
    for (int t = 0; t < p.iterations && status == device::kSuccess; ++t) {
      status = device::launch(step<E, D>, grid, ForwardStep<E>(f, scratch, t), stream);
    }
    return status;
  });
}

template <class Stream>
device::Status run_backward(const Backward& b, Stream stream) {
  const Problem& p = b.problem;
  return with_types(p, [&]<class E, int D>() {
    const int64_t rows = p.all_heads() * padded_rows(p);
    const BackwardScratch<E> scratch(p, b.scratch, D);
    device::Status status = device::launch(rebuild<E, D>,
                                           {blocks_for(rows, kRebuildThreads / kWarp), kRebuildThreads},
                                           BackwardStep<E>(b, scratch, p.iterations, D),
                                           stream);
    using T = GradientTile<E, D>;
    const device::Grid grid{
        p.all_heads() * blocks_for(p.length, T::kRows), T::kWarps * kWarp, T::kSharedBytes};
    const bool has_q = p.q.data != nullptr;
    for (int t = p.iterations - 1; t >= 0 && status == device::kSuccess; --t) {
      BackwardStep<E> step(b, scratch, t, D);
      step.as_query = true;
      if constexpr (kSumsInner<E>) {
        status = device::launch(gradient<E, D, true>, grid, step, stream);
        if (status != device::kSuccess) break;
      }
      if (has_q) {
        status = device::launch(gradient<E, D, false>, grid, step, stream);
        if (status != device::kSuccess) break;
        step.as_query = false;
      }
      step.as_key = true;
      status = device::launch(gradient<E, D, false>, grid, step, stream);
    }
    if (status != device::kSuccess || !b.grad_threshold) return status;
    const int shared_bytes = kSumThreads / kWarp * static_cast<int>(sizeof(float));
    return device::launch(sum_threshold<E>,
                          {p.all_heads(), kSumThreads, shared_bytes},
                          BackwardStep<E>(b, scratch, 0, D),
                          stream);
  });
}

}  // namespace molex::rpc
