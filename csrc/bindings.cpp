// The Python module: build facts only. Operators register themselves with PyTorch's dispatcher when
// the library is loaded, and tensors never cross this boundary.

// Nothing here is of torch, and torch 2.11's copy of pybind11 refuses to be included where this is defined.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "build_facts.h"  // written by setup.py: MOLEX_BUILD_FACTS, pairs of a name and a text
#include "cpu/common/target.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled operators of molex_kernels and how they were built.";
  module.def("build_facts", [] {
    const int lanes = molex::versions([](auto registers) MOLEX_LAMBDA_INLINE { return registers.kLanes; })();
    pybind11::dict facts;
    facts["compiler"] = __VERSION__;
    facts["vectors"] = std::to_string(lanes) + " floats";
    for (const auto& [name, text] : {MOLEX_BUILD_FACTS}) facts[name] = text;
    return facts;
  });
}
