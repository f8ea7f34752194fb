// The Python module: build facts only. Operators register themselves with PyTorch's dispatcher when
// the library is loaded, and tensors never cross this boundary.

#include <pybind11/pybind11.h>

#ifndef MOLEX_CUDA_VERSION
#define MOLEX_CUDA_VERSION ""
#endif
#ifndef MOLEX_CUDA_ARCHITECTURES
#define MOLEX_CUDA_ARCHITECTURES ""
#endif
#define MOLEX_STRINGIFY_(x) #x
#define MOLEX_STRINGIFY(x) MOLEX_STRINGIFY_(x)

namespace py = pybind11;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "Compiled operators of molex_kernels and how they were built.";
  module.def("build_facts", [] {
    py::dict facts;
    facts["built"] = true;
    facts["compiler"] = __VERSION__;
    facts["cxx_flags"] = MOLEX_CXX_FLAGS;
    facts["torch_version"] = MOLEX_TORCH_VERSION;
    facts["torch_target_version"] = MOLEX_STRINGIFY(TORCH_TARGET_VERSION);
    facts["cuda_version"] = MOLEX_CUDA_VERSION;
    facts["cuda_architectures"] = MOLEX_CUDA_ARCHITECTURES;
    facts["operators"] = MOLEX_OPERATORS;
    return facts;
  });
}
