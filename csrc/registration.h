// How a native kernel becomes the implementation of an operator on one device.
//
// Every schema ends in `str impl=''`, by which a caller may insist on an implementation. Kernels do not take
// that argument: it is checked here, where only the device's own implementation can be meant.

#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

namespace molex {

// The kernel `function` with `impl` as one more argument, which may be empty or `Device::kName`.
template <class Device, auto function>
struct WithImpl;

template <class Device, class Result, class... Arguments, Result (*function)(Arguments...)>
struct WithImpl<Device, function> {
  static Result call(Arguments... arguments, std::string impl) {
    STD_TORCH_CHECK(impl.empty() || impl == Device::kName,
                    "impl='",
                    impl,
                    "' is not what runs here: expected '",
                    Device::kName,
                    "', or '' for what this device has");
    return function(std::forward<Arguments>(arguments)...);
  }
};

struct Cpu {
  static constexpr const char* kName = "cpu";
};
struct Cuda {
  static constexpr const char* kName = "cuda";
};

// What `library.impl` takes: library.impl("layer_vote", molex::cpu_kernel<&layer_vote>).
template <auto function>
constexpr auto* cpu_kernel = TORCH_BOX((&WithImpl<Cpu, function>::call));
template <auto function>
constexpr auto* cuda_kernel = TORCH_BOX((&WithImpl<Cuda, function>::call));

}  // namespace molex
