// Picking elements out of one row: what the instruction-set files implement.
#pragma once

#include <cstdint>

namespace diffprune {

// Writes the elements of source whose bit in masks is set to target, n_kept of them. Bit i of masks is element i.
// Reads and writes nothing outside the row.
void compress_row4_avx512(const uint32_t* source, int64_t n, const uint64_t* masks, uint32_t* target, int64_t n_kept);
void compress_row2_vbmi2(const uint16_t* source, int64_t n, const uint64_t* masks, uint16_t* target, int64_t n_kept);
void compress_row1_vbmi2(const uint8_t* source, int64_t n, const uint64_t* masks, uint8_t* target, int64_t n_kept);

}  // namespace diffprune
