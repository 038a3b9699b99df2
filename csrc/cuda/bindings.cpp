// Python's door to the CUDA kernels. Everything has been checked in diffprune_fast/ops before a call comes here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "slice_channels.h"
#include "slice_table.h"

namespace py = pybind11;
using namespace diffprune;

namespace {

// pybind11 knows a struct's dtype for the whole process and takes it once, however often the module is imported.
void register_rows() {
  static const bool once = [] {
    PYBIND11_NUMPY_DTYPE(GatherEntry, source, target, rows, d0, k0, b, source_row, target_row, c, keep0, keep1,
                         log2_unit, log2_width, rows_per_tile, column_tiles, scale, scale_kind, scale_rows,
                         scale_columns, first_tile);
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of diffprune_fast";
  m.attr("ABI") = 3;
  register_rows();
  m.attr("GATHER_ENTRY") = py::dtype::of<GatherEntry>();  // compared with slice_tables.ENTRY by ops/cuda.py
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  // Addresses of NumPy arrays that slice_tables.py has made: rows of int64, one per struct.
  m.def(
      "fill_table",
      [](int64_t tensors, int64_t n, int64_t dims, int64_t keeps, int64_t entries, int64_t tiles) {
        const auto at = [](int64_t address) { return reinterpret_cast<void*>(static_cast<intptr_t>(address)); };
        return fill_table(static_cast<GivenTensor*>(at(tensors)), n, static_cast<GivenDim*>(at(dims)),
                          static_cast<GivenKeep*>(at(keeps)), static_cast<GatherEntry*>(at(entries)),
                          static_cast<int64_t*>(at(tiles)));
      },
      py::arg("tensors"), py::arg("n"), py::arg("dims"), py::arg("keeps"), py::arg("entries"), py::arg("tiles"));
  m.def(
      "slice_channels",
      [](int64_t entries, int64_t tile_entry, int64_t first, int64_t tiles, int device, int64_t stream) {
        const py::gil_scoped_release release;
        slice_channels_cuda({entries, tile_entry, first, tiles, device, stream});
      },
      py::arg("entries"), py::arg("tile_entry"), py::arg("first"), py::arg("tiles"), py::arg("device"),
      py::arg("stream"));
}
