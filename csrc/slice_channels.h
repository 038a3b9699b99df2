// slice_channels_: what Python hands over. Pointers and sizes; no tensors.
// A field that comes or goes here does so in bindings.cpp too, from where ops/cpu.py has the names.
#pragma once

#include <cstdint>

#include "channel_scores.h"

namespace diffprune {

// One dense tensor, its dims merged in memory order to (pre, a, mid, b, post): a and b are the sliced dims, either of
// which may be absent (size 1, kept whole).
struct SliceEntry {
  const void* source;
  void* target;  // (pre, n_keep_a, mid, n_keep_b, post): the source itself, or memory that doesn't overlap
  int64_t element_size;
  int64_t pre, a, mid, b, post;
  const int64_t* keep_a;  // sorted; null: whole
  const int64_t* keep_b;
  int64_t n_keep_a, n_keep_b;
  const double* scale;  // (n_keep_a,) factor, or null
  Dtype dtype;          // read only with scale
};

void slice_channels_cpu(const SliceEntry* entries, int64_t n_entries, int threads);

// Whether slicing in place gives the memory behind the kept elements back on this system.
bool can_slice_in_place();

}  // namespace diffprune
