// The Python module: build facts only, in Python's limited API, so that one library serves every Python from
// 3.10 on. Operators register themselves with PyTorch's dispatcher when the library is loaded, and tensors
// never cross this boundary.

#include <Python.h>

#include <exception>
#include <string>

#include "build_facts.h"  // written by setup.py: MOLEX_BUILD_FACTS, the members of a JSON object
#include "cpu/common/tiles.h"

#ifndef Py_LIMITED_API
#error "expected Py_LIMITED_API: the library is named for every Python"
#endif

namespace {

// What is known of the compiler and of this machine goes in front of what setup.py knows.
PyObject* build_facts(PyObject*, PyObject*) {
  const int lanes = molex::versions([](auto registers) MOLEX_LAMBDA_INLINE { return registers.kLanes; })();
  std::string tiles;
  try {
    tiles = molex::tile_path_name();
  } catch (const std::exception&) {
    tiles = "an error: what MOLEX_CPU_TILES asks for is not there";
  }
  const std::string facts = "{\"compiler\": \"" __VERSION__ "\", \"vectors\": \"" + std::to_string(lanes) +
                            " floats\", \"tiles\": \"" + tiles + "\", " MOLEX_BUILD_FACTS "}";
  return PyUnicode_FromStringAndSize(facts.data(), static_cast<Py_ssize_t>(facts.size()));
}

PyMethodDef methods[] = {
    {"build_facts", build_facts, METH_NOARGS, "How the library was built, a JSON object of texts."},
    {},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled operators of molex_kernels and how they were built.",
    0,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

// Where the compiler makes code for one level of x86-64 only, a processor below it cannot run any.
bool runs_here() {
#if defined(__x86_64__) && defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f");
#elif defined(__x86_64__) && defined(__AVX2__)
  return __builtin_cpu_supports("avx2");
#else
  return true;
#endif
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  if (runs_here()) return PyModule_Create(&definition);
  PyErr_SetString(PyExc_ImportError, "it was compiled for vectors that this processor does not have");
  return nullptr;
}
