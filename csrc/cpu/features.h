// Which instruction sets this machine has: asked at run time, so that one build serves every machine.
#pragma once

namespace diffprune {

enum class Simd { baseline = 0, avx2 = 1, avx512 = 2 };

// The widest level that the processor and the operating system support, or a narrower one set by limit_simd.
Simd simd_level();
// For tests: never above what the machine has. Returns the level now in use.
Simd limit_simd(Simd level);
const char* simd_name(Simd level);
// Byte and word compress (AVX-512 VBMI2), on top of Simd::avx512.
bool has_vbmi2();

}  // namespace diffprune
