// channel_scores_: what Python hands over. Pointers, sizes and strides; no tensors.
// A field that comes or goes here does so in bindings.cpp too, from where ops/cpu.py has the names.
#pragma once

#include <cstdint>

namespace diffprune {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
enum class Criterion : int { abs = 0, signed_ = 1, square = 2, magnitude = 3 };

// One tensor, dense: `outer` rows of inner * trailing elements that lie together.
// Element (o, i, k) is at o * inner * trailing + i * inner_stride + k * trailing_stride, where one of the two strides
// is 1: inner_stride == trailing (contiguous) or trailing_stride == inner (channels_last).
struct ScoreEntry {
  const void* theta;
  void* grad;  // (steps, *shape), written only when zero_grad; null for Criterion::magnitude
  Dtype dtype;
  int64_t outer, inner, trailing;
  int64_t inner_stride, trailing_stride;
  const int32_t* row_units;  // (outer,) or null; -1 is nowhere
  const int32_t* col_units;  // (inner,) or null
  double weight;
};

struct ScoreCall {
  const ScoreEntry* entries;
  int64_t n_entries;
  Criterion criterion;
  const double* timestep_weights;  // (steps,) or null for one gradient without a weight
  int64_t steps;                   // 1 if timestep_weights is null
  bool zero_grad;
  int threads;
};

// Adds into scores (n_units,). The bits don't depend on `threads`.
void channel_scores_cpu(const ScoreCall& call, double* scores);
void channel_scores_cpu(const ScoreCall& call, float* scores);

}  // namespace diffprune
