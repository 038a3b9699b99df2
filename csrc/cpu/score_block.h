// The streaming pass over one block of one tensor: what the instruction-set files implement.
#pragma once

#include <cstdint>

#include "channel_scores.h"

namespace diffprune {

// rows x cols elements whose rows are row_stride elements apart.
struct ScoreBlock {
  const void* theta;
  void* grad;
  int64_t rows, cols, row_stride;
  int64_t steps, step_stride;      // stacked gradients are step_stride elements apart
  const double* timestep_weights;  // (steps,) or null
  bool zero_grad;
  int64_t fold_inner, fold_trailing;  // how the cols fold into inner indices: cols = inner * trailing
  int64_t inner_stride, trailing_stride;
  void* scratch;     // scratch_bytes(cols), 64-byte aligned
  double* row_sums;  // (rows,), written
  double* col_sums;  // (fold_inner,), written
};

constexpr int64_t scratch_bytes(int64_t cols) { return (cols + 16) * 8; }

using ScoreBlockFn = void (*)(const ScoreBlock&);

ScoreBlockFn score_block_baseline(Dtype dtype, Criterion criterion, bool stacked);
ScoreBlockFn score_block_avx2(Dtype dtype, Criterion criterion, bool stacked);
ScoreBlockFn score_block_avx512(Dtype dtype, Criterion criterion, bool stacked);

}  // namespace diffprune
