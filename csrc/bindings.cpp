#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of diffprune_fast";
  m.def("abi", [] { return 1; });
}
