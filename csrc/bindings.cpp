// The Python module: build facts only. Operators register themselves with PyTorch's dispatcher when
// the library is loaded, and tensors never cross this boundary.

#include <Python.h>

#include <cstdint>
#include <string>

#include "build_facts.h"  // written by setup.py: MOLEX_BUILD_FACTS, pairs of a name and a text
#include "cpu/target.h"

namespace molex {

MOLEX_VERSIONS(lanes_of, (int64_t* lanes), *lanes = kLanes;)

PyObject* build_facts(PyObject*, PyObject*) {
  int64_t lanes = 0;
  lanes_of(&lanes);
  const std::string vectors = std::to_string(lanes) + " floats";
  const char* const facts[][2] = {{"compiler", __VERSION__}, {"vectors", vectors.c_str()}, MOLEX_BUILD_FACTS};
  PyObject* const named = PyDict_New();
  for (const auto& [name, text] : facts) {
    PyObject* const value = named ? PyUnicode_FromString(text) : nullptr;
    if (!value || PyDict_SetItemString(named, name, value)) {
      Py_XDECREF(value);
      Py_XDECREF(named);
      return nullptr;
    }
    Py_DECREF(value);
  }
  return named;
}

PyMethodDef functions[] = {{"build_facts", build_facts, METH_NOARGS, nullptr}, {}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Compiled operators of molex_kernels and how they were built.",
                          -1,
                          functions};

}  // namespace molex

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&molex::definition); }
