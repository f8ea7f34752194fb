// RPC attention, a method of robust attention (arXiv 2406.13762), in its scaled dual. For each head,
// with L = u = 0 at first and for every t of n iterations,
//   a = k - L + u ;  S = 0 where |a| < T, else a - sign(a) T ;  K~ = k - S - u
//   L = softmax(scale * (q or K~) K~^T) v ;  u = u + k - L - S
// The result is L. While an attention runs, of the state only w = u + k - S is needed: u' = w - L'.
//
// No Torch header is included here or below. The caller fills the parameters, gives scratch memory of
// the size that it is told, and launches on its stream; nothing waits for the device.

#pragma once

#include "cuda/rpc_attention/backward_on_chip.cuh"
#include "cuda/rpc_attention/forward.cuh"
#include "cuda/rpc_attention/gradient.cuh"
#include "cuda/rpc_attention/on_chip.cuh"
#include "cuda/rpc_attention/warp_groups.cuh"

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

// How the forward pass runs: on chip by warp groups, by a cluster of blocks or by one block, or in a launch
// per iteration.
enum class Form { kWarpGroups, kCluster, kAlone, kIterated };

template <class E, int D, int Keys>
bool runs_in_warp_groups(const Problem& p) {
  constexpr auto kKernel = rpc_forward_warp_groups<E, D, Keys>;
  const WarpGroups<E, D, Keys> plan(p);
  return plan.fits && device::has_wgmma<kKernel>(plan.kThreads) &&
         device::clusters_fit<kKernel>(plan.grid(p));
}

template <class E, int D>
Form form_of(const Problem& p) {
  if constexpr (kRunsInWarpGroups<E, D>) {
    const auto runs = [&]<int Keys>() { return runs_in_warp_groups<E, D, Keys>(p); };
    if (p.length <= kMostKeys && with_keys(p.length, runs)) return Form::kWarpGroups;
  }
  const OnChip<E, D> plan(p);
  if (plan.fits && device::clusters_fit<rpc_forward_on_chip<E, D, false>>(plan.grid(p)))
    return Form::kCluster;
  return kRunsAlone<E, D> && OnChip<E, D, true>(p).fits ? Form::kAlone : Form::kIterated;
}

// What names kernels is a template, so that a translation unit compiles those of the pass that it calls only.
template <class P>
Form forward_form(const P& p) {
  return with_types(p, [&]<class E, int D>() { return form_of<E, D>(p); });
}

inline int64_t forward_scratch(const Problem& p, Form form) {
  if (form != Form::kIterated) return 0;
  return with_types(p, [&]<class E, int D>() { return ForwardScratch<E>(p, nullptr, D).bytes; });
}

// How the backward pass runs: all iterations on chip, or in launches for each.
enum class BackwardForm { kOnChip, kIterated };

// The blocks' warp groups, and whether there is q, of the kernel that holds a head on chip.
template <class E, int D, class Function>
auto with_groups(const Problem& p, const Function& function) {
  const auto call = [&]<bool HasQ>() {
    if (BackwardOnChip<E, D, 1, HasQ>(p).fits) return function.template operator()<1, HasQ>();
    return function.template operator()<2, HasQ>();
  };
  return p.q.data ? call.template operator()<true>() : call.template operator()<false>();
}

template <class P>
BackwardForm backward_form(const P& p) {
  return with_types(p, [&]<class E, int D>() {
    bool on_chip = false;
    if constexpr (kGradientOnChip<E, D>) {
      on_chip = with_groups<E, D>(p, [&]<int Groups, bool HasQ>() {
        constexpr auto kKernel = rpc_backward_on_chip<E, D, Groups, HasQ>;
        const BackwardOnChip<E, D, Groups, HasQ> plan(p);
        return plan.fits && device::has_wgmma<kKernel>(plan.kThreads) &&
               device::clusters_fit<kKernel>(plan.grid(p));
      });
    }
    return on_chip ? BackwardForm::kOnChip : BackwardForm::kIterated;
  });
}

inline int64_t backward_scratch(const Problem& p, BackwardForm form) {
  if (form == BackwardForm::kOnChip) return 0;
  return with_types(p, [&]<class E, int D>() { return BackwardScratch<E>(p, nullptr, D).bytes; });
}

inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <class Stream>
device::Status run_forward(const Forward& f, Form form, Stream stream) {
  const Problem& p = f.problem;
  return with_types(p, [&]<class E, int D>() {
    if constexpr (kRunsInWarpGroups<E, D>) {
      if (form == Form::kWarpGroups) {
        return with_keys(p.length, [&]<int Keys>() {
          const WarpGroups<E, D, Keys> plan(p);
          return device::launch<rpc_forward_warp_groups<E, D, Keys>>(
              plan.grid(p), WarpGroupForward<E, D, Keys>{f, plan}, stream);
        });
      }
    }
    if (form == Form::kCluster) {
      const OnChip<E, D> plan(p);
      return device::launch<rpc_forward_on_chip<E, D, false>>(
          plan.grid(p), OnChipForward<E, D, false>{f, plan}, stream);
    }
    if constexpr (kRunsAlone<E, D>) {
      if (form == Form::kAlone) {
        const OnChip<E, D, true> plan(p);
        return device::launch<rpc_forward_on_chip<E, D, true>>(
            plan.grid(p), OnChipForward<E, D, true>{f, plan}, stream);
      }
    }
    const ForwardScratch<E> scratch(p, f.scratch, D);
    device::Status status = device::launch<rpc_forward_prepare<E, D>>(
        {Place<D, kPrepareThreads>::blocks(p), kPrepareThreads}, ForwardLaunch<E>(f, scratch, -1), stream);
    using T = ForwardTile<E, D>;
    const device::Grid grid{
        p.all_heads() * blocks_for(p.length, T::kRows), T::kWarps * kWarp, T::kSharedBytes};
    for (int t = 0; t < p.iterations && status == device::kSuccess; ++t) {
      status = device::launch<rpc_forward_iteration<E, D>>(grid, ForwardLaunch<E>(f, scratch, t), stream);
    }
    return status;
  });
}

template <class Stream>
device::Status run_backward(const Backward& b, BackwardForm form, Stream stream) {
  const Problem& p = b.problem;
  return with_types(p, [&]<class E, int D>() {
    if constexpr (kGradientOnChip<E, D>) {
      if (form == BackwardForm::kOnChip) {
        return with_groups<E, D>(p, [&]<int Groups, bool HasQ>() {
          const BackwardOnChip<E, D, Groups, HasQ> plan(p);
          return device::launch<rpc_backward_on_chip<E, D, Groups, HasQ>>(
              plan.grid(p), BackwardOnChipLaunch<E, D, Groups, HasQ>{b, plan}, stream);
        });
      }
    }
    const BackwardScratch<E> scratch(p, b.scratch, D);
    device::Status status =
        device::launch<rpc_backward_rebuild<E, D>>({Place<D, kRebuildThreads>::blocks(p), kRebuildThreads},
                                                   BackwardLaunch<E>(b, scratch, p.iterations, D),
                                                   stream);
    using T = BackwardTile<E, D>;
    const device::Grid grid{p.all_heads() * blocks_for(p.length, T::kRows), T::kThreads, T::kSharedBytes};
    const bool has_q = p.q.data != nullptr;
    for (int t = p.iterations - 1; t >= 0 && status == device::kSuccess; --t) {
      const BackwardLaunch<E> step(b, scratch, t, D);
      const bool drops = p.seed && t + 1 == p.iterations;
      const auto launch = [&]<Role R>() {
        if (status != device::kSuccess) return;
        status = drops ? device::launch<rpc_backward_iteration<E, D, R, true>>(grid, step, stream)
                       : device::launch<rpc_backward_iteration<E, D, R, false>>(grid, step, stream);
      };
      if constexpr (kSumsInner<E>) launch.template operator()<Role::kInner>();
      if (has_q) {
        launch.template operator()<Role::kQuery>();
        launch.template operator()<Role::kKey>();
      } else {
        launch.template operator()<Role::kBoth>();
      }
    }
    if (status != device::kSuccess || !b.grad_threshold) return status;
    const int shared_bytes = kSumThreads / kWarp * static_cast<int>(sizeof(float));
    return device::launch<rpc_backward_threshold<E>>(
        {p.all_heads(), kSumThreads, shared_bytes}, BackwardLaunch<E>(b, scratch, 0, D), stream);
  });
}

}  // namespace molex::rpc
