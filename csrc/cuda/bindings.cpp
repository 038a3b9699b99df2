// Python's door to the CUDA kernels. Everything has been checked in diffprune_fast/ops before a call comes here.
#include <pybind11/pybind11.h>

#include "slice_channels.h"

namespace py = pybind11;
using namespace diffprune;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of diffprune_fast";
  m.attr("ABI") = 1;
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def(
      "slice_channels",
      [](int64_t entries, int64_t tile_entry, int64_t tiles, int64_t ticket, int64_t read, int64_t frontier, int device,
         int64_t stream) {
        const py::gil_scoped_release release;
        slice_channels_cuda({entries, tile_entry, tiles, ticket, read, frontier, device, stream});
      },
      py::arg("entries"), py::arg("tile_entry"), py::arg("tiles"), py::arg("ticket"), py::arg("read"),
      py::arg("frontier"), py::arg("device"), py::arg("stream"));
  m.def("slice_channels_blocks", &slice_channels_blocks, py::arg("device"));
}
