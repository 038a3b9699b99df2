// Python's door to the CPU kernels. Everything has been checked in diffprune_fast/ops before a call comes here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "channel_scores.h"
#include "cpu/features.h"
#include "slice_channels.h"

namespace py = pybind11;
using namespace diffprune;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

template <class T>
void expect(const Array<T>& array, py::ssize_t rows, py::ssize_t cols, const char* name) {
  const bool fits = cols == 0 ? array.ndim() == 1 && array.shape(0) == rows
                              : array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == cols;
  if (!fits) throw std::invalid_argument(std::string(name) + " has the wrong shape");
}

// layout: (n, 6) dtype, outer, inner, trailing, inner_stride, trailing_stride
void channel_scores(int64_t scores, bool scores_f64, Array<int64_t> thetas, Array<int64_t> grads, Array<int64_t> layout,
                    Array<int64_t> units, Array<double> weights, int criterion,
                    std::optional<Array<double>> timestep_weights, bool zero_grad, int threads) {
  const py::ssize_t n = thetas.shape(0);
  expect(thetas, n, 0, "thetas");
  expect(grads, n, 0, "grads");
  expect(layout, n, 6, "layout");
  expect(units, n, 2, "units");
  expect(weights, n, 0, "weights");
  std::vector<ScoreEntry> entries(n);
  for (py::ssize_t i = 0; i < n; ++i)
    entries[i] = {pointer<const void>(thetas.at(i)),
                  pointer<void>(grads.at(i)),
                  static_cast<Dtype>(layout.at(i, 0)),
                  layout.at(i, 1),
                  layout.at(i, 2),
                  layout.at(i, 3),
                  layout.at(i, 4),
                  layout.at(i, 5),
                  pointer<const int32_t>(units.at(i, 0)),
                  pointer<const int32_t>(units.at(i, 1)),
                  weights.at(i)};
  ScoreCall call{entries.data(),
                 n,
                 static_cast<Criterion>(criterion),
                 timestep_weights ? timestep_weights->data() : nullptr,
                 timestep_weights ? timestep_weights->size() : 1,
                 zero_grad,
                 threads};
  py::gil_scoped_release release;
  if (scores_f64)
    channel_scores_cpu(call, pointer<double>(scores));
  else
    channel_scores_cpu(call, pointer<float>(scores));
}

// table: (n, 14) source, target, element_size, pre, a, mid, b, post, keep_a, keep_b, n_keep_a, n_keep_b, scale, dtype
void slice_channels(Array<int64_t> table, int threads) {
  const py::ssize_t n = table.ndim() ? table.shape(0) : 0;
  expect(table, n, 14, "table");
  std::vector<SliceEntry> entries(n);
  for (py::ssize_t i = 0; i < n; ++i)
    entries[i] = {pointer<const void>(table.at(i, 0)),
                  pointer<void>(table.at(i, 1)),
                  table.at(i, 2),
                  table.at(i, 3),
                  table.at(i, 4),
                  table.at(i, 5),
                  table.at(i, 6),
                  table.at(i, 7),
                  pointer<const int64_t>(table.at(i, 8)),
                  pointer<const int64_t>(table.at(i, 9)),
                  table.at(i, 10),
                  table.at(i, 11),
                  pointer<const double>(table.at(i, 12)),
                  static_cast<Dtype>(table.at(i, 13))};
  py::gil_scoped_release release;
  slice_channels_cpu(entries.data(), n, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of diffprune_fast. Addresses in, nothing checked: call diffprune_fast.ops instead.";
  m.attr("ABI") = 3;  // raised whenever a signature changes; ops/cpu.py refuses another one
  m.def("channel_scores", &channel_scores);
  m.def("slice_channels", &slice_channels);
  m.def("can_slice_in_place", &can_slice_in_place);
  m.def("simd", [] { return simd_name(simd_level()); });
  m.def(
      "limit_simd", [](int level) { return simd_name(limit_simd(static_cast<Simd>(level))); },
      "For tests: 0 baseline, 1 AVX2, 2 AVX-512; never above what the machine has.");
}
