// slice_channels_ on the CPU: one pass over what stays, both dims at once.
//
// In place (target == source) one thread walks a tensor from its first row to its last. A kept element's place in the
// target is never behind its place in the source, and sources are read in ascending order, so nothing is overwritten
// that is still to be read: that holds for elements, for vectors of them (loaded before they are stored) and for runs
// (memmove). The pages behind the kept elements are given back. Threads share the tensors, the largest first. Into
// other memory, tensors are cut up among the threads.
//
// All that can fail (tables that don't fit, memory for the jobs) comes before the first byte moves: a call that raises
// has changed nothing.
#include "slice_channels.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "cpu/features.h"
#include "cpu/slice_rows.h"
#include "cpu/threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace diffprune {
namespace {

constexpr int64_t PORTION = 1 << 20;    // bytes written per piece of work
constexpr int64_t RUN_BYTES = 192;      // from this mean length on, runs of kept elements are copied by memcpy
constexpr int64_t HUGE_PAGE = 2 << 20;  // size of a transparent huge page

struct Run {
  int64_t from, length;  // bytes
};

// How the kept part of one row (b * post bytes) is picked; the same for all rows of a tensor.
struct RowPick {
  enum class Way { runs, compress, gather } way = Way::runs;
  std::vector<Run> runs;
  std::vector<uint64_t> masks;  // compress: a bit per element
  std::vector<int32_t> index;   // gather: source element per kept element
  int64_t width = 1;            // bytes of an element of masks and index
  int64_t n = 0, n_kept = 0;    // elements in and out

  RowPick(const int64_t* keep, int64_t n_keep, int64_t b, int64_t post) {
    if (!keep) {
      runs.push_back({0, b * post});
      return;
    }
    for (int64_t i = 0; i < n_keep; ++i) {
      if (i && keep[i] == keep[i - 1] + 1)
        runs.back().length += post;
      else
        runs.push_back({keep[i] * post, post});
    }
    if (n_keep * post / static_cast<int64_t>(runs.size()) >= RUN_BYTES) return;
    const bool wide = simd_level() == Simd::avx512;
    width = post % 4 == 0 ? 4 : post % 2 == 0 ? 2 : 1;
    if (!(wide && (width == 4 || has_vbmi2())) && post % 8 == 0) width = 8;
    n = b * post / width;
    n_kept = n_keep * post / width;
    const int64_t per = post / width;
    const bool far = n > std::numeric_limits<int32_t>::max();  // beyond what index can name: by runs, however short
    if (wide && width <= 4 && (width == 4 || has_vbmi2())) {
      way = Way::compress;
      masks.assign((n + 63) / 64, 0);
      for (int64_t i = 0; i < n_keep; ++i)
        for (int64_t e = keep[i] * per; e < (keep[i] + 1) * per; ++e) masks[e / 64] |= uint64_t{1} << (e % 64);
    } else if (!far) {
      way = Way::gather;
      index.reserve(n_kept);
      for (int64_t i = 0; i < n_keep; ++i)
        for (int64_t e = 0; e < per; ++e) index.push_back(static_cast<int32_t>(keep[i] * per + e));
    }
  }

  template <class Element>
  void gather(const char* source, char* target) const {
    for (int64_t i = 0; i < n_kept; ++i) {  // memcpy: a storage need not be aligned to its elements
      Element e;
      std::memcpy(&e, source + index[i] * sizeof e, sizeof e);
      std::memcpy(target + i * sizeof e, &e, sizeof e);
    }
  }

  void copy(const char* source, char* target) const noexcept {
    if (way == Way::runs) {
      for (const Run& run : runs) {
        std::memmove(target, source + run.from, run.length);
        target += run.length;
      }
    } else if (way == Way::gather) {
      if (width == 8) gather<uint64_t>(source, target);
      if (width == 4) gather<uint32_t>(source, target);
      if (width == 2) gather<uint16_t>(source, target);
      if (width == 1) gather<uint8_t>(source, target);
    }
#if defined(__x86_64__) && defined(__GNUC__)
    else if (width == 4) {
      compress_row4_avx512(reinterpret_cast<const uint32_t*>(source), n, masks.data(),
                           reinterpret_cast<uint32_t*>(target), n_kept);
    } else if (width == 2) {
      compress_row2_vbmi2(reinterpret_cast<const uint16_t*>(source), n, masks.data(),
                          reinterpret_cast<uint16_t*>(target), n_kept);
    } else {
      compress_row1_vbmi2(reinterpret_cast<const uint8_t*>(source), n, masks.data(), reinterpret_cast<uint8_t*>(target),
                          n_kept);
    }
#endif
  }
};

float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float widen_f16(uint16_t half) {
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t special = magnitude >= (0x7c00u << 13) ? 0x7f800000u : 0;
  const uint32_t sign = (half & 0x8000u) << 16;
  return bits_to_float(float_to_bits(bits_to_float(magnitude) * 0x1p112f) | special | sign);
}

uint16_t narrow_f16(float value) {  // to nearest, ties to even
  const uint32_t sign = float_to_bits(value) >> 16 & 0x8000u;
  const uint32_t magnitude = float_to_bits(value) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u)  // subnormal: the addition of 0.5 makes the hardware round at the right bit
    return sign | static_cast<uint16_t>(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

float widen_bf16(uint16_t half) { return bits_to_float(static_cast<uint32_t>(half) << 16); }

uint16_t narrow_bf16(float value) {  // to nearest, ties to even
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void scale_row(char* row, int64_t bytes, Dtype dtype, double factor) {
  const auto f = static_cast<float>(factor);
  auto each = [&](auto zero, auto scaled) {
    for (char* end = row + bytes; row != end; row += sizeof zero) {
      auto value = zero;
      std::memcpy(&value, row, sizeof value);
      value = scaled(value);
      std::memcpy(row, &value, sizeof value);
    }
  };
  switch (dtype) {
    case Dtype::f64:
      return each(double{}, [&](double v) { return v * factor; });
    case Dtype::f32:
      return each(float{}, [&](float v) { return v * f; });
    case Dtype::bf16:
      return each(uint16_t{}, [&](uint16_t v) { return narrow_bf16(widen_bf16(v) * f); });
    case Dtype::f16:
      return each(uint16_t{}, [&](uint16_t v) { return narrow_f16(widen_f16(v) * f); });
  }
}

// The whole pages of [begin, end) go back to the system; the addresses stay valid.
void give_back_pages(char* begin, char* end) {
#if defined(__linux__)
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
#else
  (void)begin, (void)end;
#endif
}

struct Job {  // one tensor
  SliceEntry entry;
  RowPick pick;
  int64_t rows, row_bytes, kept_bytes;  // rows of the target; bytes of a row in the source and in the target
  int64_t rows_per_portion, first_portion = 0, portions;
  bool in_place;

  explicit Job(const SliceEntry& e) : entry(simplify(e)), pick(entry.keep_b, entry.n_keep_b, entry.b, post()) {
    rows = entry.pre * entry.n_keep_a * entry.mid;
    row_bytes = entry.b * post();
    kept_bytes = entry.n_keep_b * post();
    in_place = entry.target == entry.source;
    rows_per_portion = in_place ? rows : std::max<int64_t>(1, PORTION / std::max<int64_t>(1, kept_bytes));
    portions = (rows + rows_per_portion - 1) / rows_per_portion;
  }

  int64_t post() const { return entry.post * entry.element_size; }

  // Dims that stay whole are merged into their neighbours, so that rows are long.
  static SliceEntry simplify(SliceEntry e) {
    if (!e.keep_b) {
      e.post *= e.mid * e.b;
      e.mid = e.b = e.n_keep_b = 1;
      if (e.keep_a && !e.scale && e.post * e.element_size < RUN_BYTES) {  // short rows: the sliced dim becomes the row
        e.b = e.a, e.keep_b = e.keep_a, e.n_keep_b = e.n_keep_a;
        e.a = e.n_keep_a = 1, e.keep_a = nullptr;
      }
    }
    if (!e.keep_a && !e.scale) {
      e.pre *= e.a * e.mid;
      e.a = e.n_keep_a = e.mid = 1;
    }
    return e;
  }

  void run(int64_t portion) const noexcept {
    const SliceEntry& e = entry;
    const int64_t begin = portion * rows_per_portion, end = std::min(rows, begin + rows_per_portion);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t m = row % e.mid, a = row / e.mid % e.n_keep_a, p = row / e.mid / e.n_keep_a;
      const int64_t from = (p * e.a + (e.keep_a ? e.keep_a[a] : a)) * e.mid + m;
      char* target = static_cast<char*>(e.target) + row * kept_bytes;
      pick.copy(static_cast<const char*>(e.source) + from * row_bytes, target);
      if (e.scale) scale_row(target, kept_bytes, e.dtype, e.scale[a]);
    }
    if (in_place) {
      char* begin = static_cast<char*>(e.target);
      give_back_pages(begin + rows * kept_bytes, begin + e.pre * e.a * e.mid * row_bytes);
    }
  }
};

void check(const int64_t* keep, int64_t n_keep, int64_t n) {
  if (n_keep < 1 || n_keep > n || (!keep && n_keep != n)) throw std::invalid_argument("a sliced dim keeps 1 to all");
  for (int64_t i = 0; keep && i < n_keep; ++i)
    if (keep[i] < (i ? keep[i - 1] + 1 : 0) || keep[i] >= n)
      throw std::invalid_argument("kept indices must be sorted, unique and below the dim's size");
}

// The tables were checked in Python; whoever changed one since then gets an exception, not another tensor's memory.
void check(const SliceEntry& e) {
  if (!e.source || !e.target || e.element_size < 1 || e.pre < 1 || e.mid < 1 || e.post < 1)
    throw std::invalid_argument("a tensor without elements can't be sliced");
  check(e.keep_a, e.n_keep_a, e.a);
  check(e.keep_b, e.n_keep_b, e.b);
}

// Fresh memory costs a page fault per page; in huge pages that is 512 times fewer.
void advise_huge(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * HUGE_PAGE) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may be ignored
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace

bool can_slice_in_place() {
#if defined(__linux__)
  return true;
#else
  return false;
#endif
}

void slice_channels_cpu(const SliceEntry* entries, int64_t n_entries, int threads) {
  for (int64_t i = 0; i < n_entries; ++i) check(entries[i]);
  std::vector<Job> jobs;
  jobs.reserve(n_entries);
  for (int64_t i = 0; i < n_entries; ++i) jobs.emplace_back(entries[i]);
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& x, const Job& y) {
    return x.in_place != y.in_place ? x.in_place : x.in_place && x.rows * x.row_bytes > y.rows * y.row_bytes;
  });
  int64_t portions = 0, bytes = 0;
  for (Job& job : jobs) {
    job.first_portion = portions;
    portions += job.portions;
    bytes += job.rows * job.kept_bytes;
    if (!job.in_place) advise_huge(job.entry.target, job.rows * job.kept_bytes);
  }
  threads = static_cast<int>(std::min<int64_t>(threads, bytes / PORTION + 1));
  parallel(portions, threads, [&](int64_t portion) {
    auto after = std::upper_bound(jobs.begin(), jobs.end(), portion,
                                  [](int64_t p, const Job& job) { return p < job.first_portion; });
    const Job& job = *(after - 1);
    job.run(portion - job.first_portion);
  });
}

}  // namespace diffprune
