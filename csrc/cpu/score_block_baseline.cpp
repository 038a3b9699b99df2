#include <cstdint>

#include "cpu/score_block.h"

#if !defined(__GNUC__)
#error "diffprune_fast's CPU kernels are written with GCC's vector types: compile with g++ >= 9 or clang++ >= 10"
#endif

#define VECTOR_BYTES 16

namespace diffprune {
namespace {
#include "cpu/score_block.inl"
}  // namespace

ScoreBlockFn score_block_baseline(Dtype dtype, Criterion criterion, bool stacked) {
  return pick(dtype, criterion, stacked);
}
}  // namespace diffprune
