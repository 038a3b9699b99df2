#include "cpu/features.h"

#include <atomic>

namespace diffprune {
namespace {

Simd detect() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return Simd::avx2;
#endif
  return Simd::baseline;
}

const Simd detected = detect();
std::atomic<Simd> level{detected};

}  // namespace

Simd simd_level() { return level.load(std::memory_order_relaxed); }

Simd limit_simd(Simd wanted) {
  level.store(wanted < detected ? wanted : detected);
  return simd_level();
}

const char* simd_name(Simd l) {
  switch (l) {
    case Simd::avx512:
      return "AVX-512";
    case Simd::avx2:
      return "AVX2";
    default:
#if defined(__aarch64__)
      return "NEON";
#else
      return "baseline";
#endif
  }
}

bool has_vbmi2() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512vbmi2");
#else
  return false;
#endif
}

}  // namespace diffprune
