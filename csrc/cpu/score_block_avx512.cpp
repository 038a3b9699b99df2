#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/score_block.h"

#if defined(__x86_64__)

// After the includes, so that nothing inline from a header is compiled for machines that may not be there.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c")
#endif

#define VECTOR_BYTES 64

namespace diffprune {
namespace {
#include "cpu/score_block.inl"
}  // namespace

ScoreBlockFn score_block_avx512(Dtype dtype, Criterion criterion, bool stacked) {
  return pick(dtype, criterion, stacked);
}
}  // namespace diffprune

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
