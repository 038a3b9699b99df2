// Random tables through both kernels, each buffer as long as its table says and not a byte longer: ASan sees every
// element that is read or written outside, and what comes out is compared with plain loops.
// Usage: fuzz_tables EXECUTIONS [SEED]; csrc/fuzz.sh builds it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/features.h"
#include "slice_channels.h"

using namespace diffprune;

namespace {

uint64_t state = 0;

// splitmix64: a seed's bits, and those of seed + 1, have nothing to do with one another.
uint64_t next() {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
bool one_in(int64_t n) { return below(n) == 0; }

// Most tables are small, so that there are many; some are large enough to be shared between threads.
int64_t most_elements = 0;
int threads = 1;

// Sizes at which kernels change their way: 1, primes, and both sides of vector and block lengths.
int64_t size(int64_t most) {
  static const int64_t known[] = {1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257};
  int64_t n = known[below(sizeof known / sizeof *known)];
  return std::max<int64_t>(1, std::min(n, most));
}

[[noreturn]] void wrong(const char* what, uint64_t seed) {
  std::fprintf(stderr, "wrong %s: fuzz_tables 1 %llu shows it\n", what, static_cast<unsigned long long>(seed));
  std::abort();
}

using Bytes = std::unique_ptr<unsigned char[]>;

Bytes bytes(int64_t n) {
  Bytes out(new unsigned char[std::max<int64_t>(n, 1)]);
  for (int64_t i = 0; i < n; i += 8) {
    const uint64_t word = next();
    std::memcpy(&out[i], &word, std::min<int64_t>(8, n - i));
  }
  return out;
}

std::vector<int64_t> kept(int64_t n) {
  std::vector<int64_t> keep;
  const int64_t odds = 1 + below(6);
  for (int64_t i = 0; i < n; ++i)
    if (one_in(odds)) keep.push_back(i);
  if (keep.empty()) keep.push_back(below(n));
  keep.shrink_to_fit();
  return keep;
}

void slices(uint64_t seed) {
  struct Held {
    Bytes source, target;
    std::vector<int64_t> a, b;
    std::vector<double> scale;
    std::vector<unsigned char> expected;
  };
  std::vector<Held> held(1 + below(3));
  std::vector<SliceEntry> entries;
  for (Held& h : held) {
    SliceEntry e{};
    const bool scaled = one_in(4);
    e.dtype = one_in(2) ? Dtype::f32 : Dtype::f64;
    static const int64_t widths[] = {1, 2, 4, 8, 16};
    e.element_size = scaled ? (e.dtype == Dtype::f32 ? 4 : 8) : widths[below(5)];
    e.pre = size(3), e.a = size(257), e.mid = size(3), e.b = size(65), e.post = size(17);
    while (e.pre * e.a * e.mid * e.b * e.post > most_elements)
      e.a = (e.a + 1) / 2, e.b = (e.b + 1) / 2, e.post = (e.post + 1) / 2;
    const int64_t total = e.pre * e.a * e.mid * e.b * e.post * e.element_size;
    h.source = bytes(total);
    e.source = h.source.get();
    if (!one_in(3)) h.a = kept(e.a);
    if (!one_in(3)) h.b = kept(e.b);
    e.keep_a = h.a.empty() ? nullptr : h.a.data(), e.keep_b = h.b.empty() ? nullptr : h.b.data();
    e.n_keep_a = h.a.empty() ? e.a : static_cast<int64_t>(h.a.size());
    e.n_keep_b = h.b.empty() ? e.b : static_cast<int64_t>(h.b.size());
    if (scaled) {
      for (int64_t i = 0; i < e.n_keep_a; ++i) h.scale.push_back(0.5 * static_cast<double>(1 + below(4)));
      h.scale.shrink_to_fit();
      e.scale = h.scale.data();
    }
    for (int64_t p = 0; p < e.pre; ++p)
      for (int64_t i = 0; i < e.n_keep_a; ++i)
        for (int64_t m = 0; m < e.mid; ++m)
          for (int64_t j = 0; j < e.n_keep_b; ++j) {
            const int64_t a = h.a.empty() ? i : h.a[i], b = h.b.empty() ? j : h.b[j];
            const unsigned char* from = &h.source[((((p * e.a + a) * e.mid + m) * e.b + b) * e.post) * e.element_size];
            h.expected.insert(h.expected.end(), from, from + e.post * e.element_size);
          }
    if (one_in(2)) {
      e.target = h.source.get();
    } else {
      h.target = bytes(static_cast<int64_t>(h.expected.size()));
      e.target = h.target.get();
    }
    entries.push_back(e);
  }
  slice_channels_cpu(entries.data(), static_cast<int64_t>(entries.size()), threads);
  for (size_t k = 0; k < held.size(); ++k) {
    const SliceEntry& e = entries[k];
    const auto* got = static_cast<const unsigned char*>(e.target);
    if (!e.scale) {
      if (std::memcmp(got, held[k].expected.data(), held[k].expected.size()) != 0) wrong("slice", seed);
      continue;
    }
    const int64_t n = static_cast<int64_t>(held[k].expected.size()) / e.element_size;
    for (int64_t i = 0; i < n; ++i) {
      const double factor = e.scale[i / (e.mid * e.n_keep_b * e.post) % e.n_keep_a];
      double before, after;
      if (e.dtype == Dtype::f32) {
        float x, y;
        std::memcpy(&x, &held[k].expected[i * 4], 4), std::memcpy(&y, got + i * 4, 4);
        before = static_cast<double>(static_cast<float>(static_cast<double>(x) * factor)), after = y;
      } else {
        std::memcpy(&before, &held[k].expected[i * 8], 8), std::memcpy(&after, got + i * 8, 8);
        before *= factor;
      }
      if (before != after && !(std::isnan(before) && std::isnan(after))) wrong("scaled slice", seed);
    }
  }
}

void scores(uint64_t seed) {
  struct Held {
    std::vector<double> theta64, grad64;
    std::vector<float> theta32, grad32;
    Bytes theta16, grad16;
    std::vector<int32_t> rows, cols;
  };
  std::vector<Held> held(1 + below(3));
  std::vector<ScoreEntry> entries;
  const int64_t n_units = 1 + below(40), steps = 1 + below(3);
  std::vector<double> weights(steps), expected(n_units), magnitude(n_units), out(n_units);
  for (double& w : weights) w = static_cast<double>(below(5)) - 2;
  const bool weighted = steps > 1 || one_in(2);
  const auto criterion = static_cast<Criterion>(below(4));
  const bool zero = one_in(3) && criterion != Criterion::magnitude;
  bool comparable = true;
  for (Held& h : held) {
    ScoreEntry e{};
    e.dtype = static_cast<Dtype>(below(4));
    e.outer = size(65), e.inner = size(257), e.trailing = size(33);
    while (e.outer * e.inner * e.trailing > most_elements)
      e.inner = (e.inner + 1) / 2, e.outer = (e.outer + 1) / 2, e.trailing = (e.trailing + 1) / 2;
    const bool last = one_in(3);
    e.inner_stride = last ? 1 : e.trailing, e.trailing_stride = last ? e.inner : 1;
    const int64_t n = e.outer * e.inner * e.trailing;
    if (e.dtype == Dtype::f64 || e.dtype == Dtype::f32) {
      for (int64_t i = 0; i < n; ++i) h.theta64.push_back(static_cast<double>(below(17)) - 8);
      for (int64_t i = 0; i < n * steps; ++i) h.grad64.push_back(static_cast<double>(below(17)) - 8);
      h.theta32.assign(h.theta64.begin(), h.theta64.end()), h.grad32.assign(h.grad64.begin(), h.grad64.end());
      h.theta64.shrink_to_fit(), h.grad64.shrink_to_fit();
      const bool wide = e.dtype == Dtype::f64;
      e.theta = wide ? static_cast<const void*>(h.theta64.data()) : h.theta32.data();
      e.grad = wide ? static_cast<void*>(h.grad64.data()) : h.grad32.data();
    } else {
      comparable = false;  // any bits, NaN among them: only what is touched is looked at
      h.theta16 = bytes(2 * n), h.grad16 = bytes(2 * n * steps);
      e.theta = h.theta16.get(), e.grad = h.grad16.get();
    }
    if (criterion == Criterion::magnitude && one_in(2)) e.grad = nullptr;
    if (!one_in(4))
      for (int64_t i = 0; i < e.outer; ++i) h.rows.push_back(static_cast<int32_t>(below(n_units + 1) - 1));
    if (!one_in(4))
      for (int64_t i = 0; i < e.inner; ++i) h.cols.push_back(static_cast<int32_t>(below(n_units + 1) - 1));
    h.rows.shrink_to_fit(), h.cols.shrink_to_fit();
    e.row_units = h.rows.empty() ? nullptr : h.rows.data(), e.col_units = h.cols.empty() ? nullptr : h.cols.data();
    e.weight = static_cast<double>(below(5)) - 2;
    for (int64_t i = 0; comparable && i < n; ++i) {
      const int64_t o = i / (e.inner * e.trailing), in = last ? i % e.inner : i / e.trailing % e.inner;
      double g = 0;
      for (int64_t t = 0; t < steps; ++t) g += (weighted ? weights[t] : 1) * h.grad64[t * n + i];
      const double x = h.theta64[i] * g;
      const double s = criterion == Criterion::abs       ? std::abs(x)
                       : criterion == Criterion::signed_ ? x
                       : criterion == Criterion::square  ? x * x
                                                         : h.theta64[i] * h.theta64[i];
      for (const int32_t u : {h.rows.empty() ? -1 : h.rows[o], h.cols.empty() ? -1 : h.cols[in]})
        if (u >= 0) expected[u] += e.weight * s, magnitude[u] += std::abs(e.weight * s);
    }
    entries.push_back(e);
  }
  const ScoreCall call{entries.data(),
                       static_cast<int64_t>(entries.size()),
                       criterion,
                       weighted ? weights.data() : nullptr,
                       weighted ? steps : 1,
                       zero,
                       threads};
  channel_scores_cpu(call, out.data());
  for (int64_t u = 0; comparable && u < n_units; ++u)
    if (std::abs(out[u] - expected[u]) > 1e-5 * magnitude[u] + 1e-9) wrong("score", seed);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t executions = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (uint64_t i = 0; i < executions; ++i) {
    state = first + i;
    limit_simd(static_cast<Simd>(below(3)));
    const bool large = one_in(64);
    most_elements = large ? 20000 : 200;
    threads = large ? 1 + static_cast<int>(below(3)) : 1;
    if (one_in(2))
      slices(first + i);
    else
      scores(first + i);
  }
  std::printf("%llu executions from seed %llu\n", static_cast<unsigned long long>(executions),
              static_cast<unsigned long long>(first));
}
