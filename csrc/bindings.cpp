// Python's door to the CPU kernels. A table is a NumPy array of the struct that the kernel reads; another dtype is
// refused here, everything else has been checked in diffprune_fast/ops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "channel_scores.h"
#include "cpu/features.h"
#include "slice_channels.h"

namespace py = pybind11;
using namespace diffprune;

// A pointer in a table's row is an address in Python.
template <class T>
struct pybind11::detail::npy_format_descriptor<T*> : npy_format_descriptor<std::uintptr_t> {
  static std::string format() { return format_descriptor<std::uintptr_t>::format(); }
};

namespace {

// The rows of a table. An array of another dtype is no table: NumPy would cast it field by field, by position.
// The dtype that Python has from here is the same object, which spares pybind11's own comparison: 1.5 us of a call's 9.
template <class T>
const T* rows(const py::array& table) {
  const py::dtype wanted = py::dtype::of<T>(), given = table.dtype();
  if (!given.is(wanted) && !given.equal(wanted))
    throw py::type_error("a table's rows must be " + std::string(py::str(wanted)) + ", not " +
                         std::string(py::str(given)));
  if (table.ndim() != 1 || !(table.flags() & py::array::c_style))
    throw py::value_error("a table must be contiguous of shape (n,)");
  return static_cast<const T*>(table.data());
}

void channel_scores(std::uintptr_t scores, bool scores_f64, const py::array& entries, int criterion,
                    const std::optional<py::array_t<double, py::array::c_style>>& timestep_weights, bool zero_grad,
                    int threads) {
  const ScoreCall call{rows<ScoreEntry>(entries),
                       entries.size(),
                       static_cast<Criterion>(criterion),
                       timestep_weights ? timestep_weights->data() : nullptr,
                       timestep_weights ? timestep_weights->size() : 1,
                       zero_grad,
                       threads};
  py::gil_scoped_release release;
  if (scores_f64)
    channel_scores_cpu(call, reinterpret_cast<double*>(scores));
  else
    channel_scores_cpu(call, reinterpret_cast<float*>(scores));
}

void slice_channels(const py::array& entries, int threads) {
  const SliceEntry* first = rows<SliceEntry>(entries);
  const py::ssize_t n = entries.size();
  py::gil_scoped_release release;
  slice_channels_cpu(first, n, threads);
}

// The dtypes of the tables' rows. pybind11 knows them for the whole process and takes them once, however often the
// module is imported.
void register_rows() {
  static const bool once = [] {
    PYBIND11_NUMPY_DTYPE(ScoreEntry, theta, grad, dtype, outer, inner, trailing, inner_stride, trailing_stride,
                         row_units, col_units, weight);
    PYBIND11_NUMPY_DTYPE(SliceEntry, source, target, element_size, pre, a, mid, b, post, keep_a, keep_b, n_keep_a,
                         n_keep_b, scale, dtype);
    return true;
  }();
  static_cast<void>(once);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of diffprune_fast. Addresses in, nothing checked: call diffprune_fast.ops instead.";
  m.attr("ABI") = 4;  // raised whenever a signature changes; ops/cpu.py refuses another one
  register_rows();
  m.attr("SCORE_ENTRY") = py::dtype::of<ScoreEntry>();
  m.attr("SLICE_ENTRY") = py::dtype::of<SliceEntry>();
  m.def("channel_scores", &channel_scores);
  m.def("slice_channels", &slice_channels);
  m.def("can_slice_in_place", &can_slice_in_place);
  m.def("simd", [] { return simd_name(simd_level()); });
  m.def(
      "limit_simd", [](int level) { return simd_name(limit_simd(static_cast<Simd>(level))); },
      "For tests: 0 baseline, 1 AVX2, 2 AVX-512; never above what the machine has.");
}
