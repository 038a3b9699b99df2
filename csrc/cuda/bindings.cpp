// Python's door to the CUDA kernels. Everything has been checked in diffprune_fast/ops before a call comes here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "slice_channels.h"
#include "slice_index.h"

namespace py = pybind11;
using namespace diffprune;

namespace {

// pybind11 knows a struct's dtype for the whole process and takes it once, however often the module is imported.
void register_rows() {
  static const bool once = [] {
    PYBIND11_NUMPY_DTYPE(TiledEntry, address, bytes, log2_element, rows, d0, k0, b, d1, k1, c, keep0, rank0, keep1,
                         cuts, rows_per_tile, segments, segment_width, scale, scale_kind, scale_period, first_tile,
                         tiles, straight, reserved);
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of diffprune_fast";
  m.attr("ABI") = 2;
  register_rows();
  m.attr("TILED_ENTRY") = py::dtype::of<TiledEntry>();  // compared with slice_tables.ENTRY by ops/cuda.py
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
