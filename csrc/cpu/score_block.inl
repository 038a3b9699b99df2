// The streaming pass, once per instruction set: the including file defines VECTOR_BYTES and the namespace.
//
// A group of GROUP rows is walked together, so that a column accumulator is loaded and stored once per GROUP elements.
// Sums run in lanes of the element's wide type (float; double for f64) for at most FLUSH_COLS columns or FLUSH_ROWS
// rows and go to double from there, so the rounding error doesn't grow with the tensor. GCC's vector types (also
// clang's) rather than intrinsics: one source for SSE2, AVX2, AVX-512 and NEON.

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t VecL __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(VECTOR_BYTES / 2)));

#define INLINE static inline __attribute__((always_inline))

template <class T>
struct Wide {
  using Lane = float;
  using Vec = VecF;
};
template <>
struct Wide<double> {
  using Lane = double;
  using Vec = VecD;
};

constexpr int64_t FLUSH_ROWS = 64;
constexpr int64_t FLUSH_VECTORS = 64;
constexpr int GROUP = 4;

INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE VecD load(const double* p) {
  VecD v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
INLINE VecF load(const Bf16* p) {
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  return (VecF)(__builtin_convertvector(h, VecU) << 16);
}
INLINE VecF load(const F16* p) {
#if VECTOR_BYTES == 64
  return (VecF)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif VECTOR_BYTES == 32
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  const VecU u = __builtin_convertvector(h, VecU);
  const VecU magnitude = (u & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias from 15 to 127, subnormals included; infinities and NaN need all exponent bits
  const VecU scaled = (VecU)((VecF)magnitude * 0x1p112f);
  const VecU special = (VecU)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  return (VecF)(scaled | special | ((u & 0x8000u) << 16));
#endif
}

// The last `n` elements of a row, zeros behind them: every criterion's value of zeros is zero.
template <class T>
INLINE typename Wide<T>::Vec load_tail(const T* p, int64_t n) {
  T padded[VECTOR_BYTES / sizeof(typename Wide<T>::Lane)];
  __builtin_memset(padded, 0, sizeof padded);
  __builtin_memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

INLINE VecF absolute(VecF v) { return (VecF)((VecU)v & 0x7fffffffu); }
INLINE VecD absolute(VecD v) { return (VecD)((VecL)v & 0x7fffffffffffffffull); }

template <Criterion C, class Vec>
INLINE Vec value(Vec theta, Vec grad) {
  const Vec product = theta * grad;
  if (C == Criterion::abs) return absolute(product);
  if (C == Criterion::square || C == Criterion::magnitude) return product * product;
  return product;
}

template <class Vec>
INLINE double total(Vec v) {
  double sum = 0;
  for (unsigned i = 0; i < sizeof(v) / sizeof(v[0]); ++i) sum += (double)v[i];
  return sum;
}

template <class T, Criterion C, bool STACKED>
struct Pass {
  using Lane = typename Wide<T>::Lane;
  using Vec = typename Wide<T>::Vec;
  static constexpr int64_t LANES = VECTOR_BYTES / sizeof(Lane);
  static constexpr bool GRADS = C != Criterion::magnitude;

  INLINE Vec element(const ScoreBlock& b, const T* theta, const T* grad, int64_t n) {
    const bool whole = n == LANES;
    const Vec t = whole ? load(theta) : load_tail(theta, n);
    if (!GRADS) return t * t;
    if (!STACKED) return value<C>(t, whole ? load(grad) : load_tail(grad, n));
    Vec g = {};
    for (int64_t s = 0; s < b.steps; ++s) {
      const T* p = grad + s * b.step_stride;
      g += (whole ? load(p) : load_tail(p, n)) * (Lane)b.timestep_weights[s];
    }
    return value<C>(t, g);
  }

  // Four vectors of one row at once: T streams of 4 * VECTOR_BYTES rather than T streams of one.
  INLINE void stacked4(const ScoreBlock& b, const T* theta, const T* grad, Vec* out) {
    Vec g0 = {}, g1 = {}, g2 = {}, g3 = {};
    for (int64_t s = 0; s < b.steps; ++s) {
      const T* p = grad + s * b.step_stride;
      const Lane w = (Lane)b.timestep_weights[s];
      for (int64_t at = 0; at < 4 * LANES; at += 64 / (int64_t)sizeof(T))
        __builtin_prefetch((const char*)(p + at) + 2048, 0, 2);
      g0 += load(p) * w;
      g1 += load(p + LANES) * w;
      g2 += load(p + 2 * LANES) * w;
      g3 += load(p + 3 * LANES) * w;
    }
    out[0] = value<C>(load(theta), g0);
    out[1] = value<C>(load(theta + LANES), g1);
    out[2] = value<C>(load(theta + 2 * LANES), g2);
    out[3] = value<C>(load(theta + 3 * LANES), g3);
  }

  // N rows of columns [from, to): adds into the columns' accumulators and the rows' sums.
  template <int N>
  static void strip(const ScoreBlock& b, const T* theta, const T* grad, int64_t from, int64_t to, Lane* acc,
                    double* row_sums) {
    Vec rows[N];
    for (int r = 0; r < N; ++r) rows[r] = (Vec){};
    int64_t j = from;
    if (STACKED) {
      for (; j + 4 * LANES <= to; j += 4 * LANES)
        for (int r = 0; r < N; ++r) {
          Vec v[4];
          stacked4(b, theta + r * b.row_stride + j, GRADS ? grad + r * b.row_stride + j : grad, v);
          for (int u = 0; u < 4; ++u) {
            Lane* a = acc + j + u * LANES;
            const Vec sum = load(a) + v[u];
            __builtin_memcpy(a, &sum, sizeof sum);
          }
          rows[r] += (v[0] + v[1]) + (v[2] + v[3]);
        }
    }
    for (; j < to; j += LANES) {
      const int64_t n = to - j < LANES ? to - j : LANES;
      if (n == LANES)
        step<N>(b, theta + j, GRADS ? grad + j : grad, LANES, acc + j, rows);
      else
        step<N>(b, theta + j, GRADS ? grad + j : grad, n, acc + j, rows);
    }
    for (int r = 0; r < N; ++r) row_sums[r] += total(rows[r]);
  }

  template <int N>
  INLINE void step(const ScoreBlock& b, const T* theta, const T* grad, int64_t n, Lane* acc, Vec* rows) {
    Vec v[N];
    for (int r = 0; r < N; ++r) {
      // 2 KiB ahead, over the page's end where the hardware prefetcher stops: -10 % (f32), -25 % (bf16) of the time
      __builtin_prefetch((const char*)(theta + r * b.row_stride) + 2048, 0, 2);
      if (GRADS) __builtin_prefetch((const char*)(grad + r * b.row_stride) + 2048, 0, 2);
      v[r] = element(b, theta + r * b.row_stride, GRADS ? grad + r * b.row_stride : grad, n);
      rows[r] += v[r];
    }
    Vec sum = load(acc);
    if (N == 4)
      sum += (v[0] + v[1 % N]) + (v[2 % N] + v[3 % N]);
    else
      for (int r = 0; r < N; ++r) sum += v[r];
    __builtin_memcpy(acc, &sum, sizeof sum);
  }

  // N rows, strip by strip; a strip's gradients are zeroed while the cache still holds them.
  template <int N>
  static void group(const ScoreBlock& b, int64_t row, Lane* acc) {
    const T* theta = (const T*)b.theta + row * b.row_stride;
    T* grad = GRADS ? (T*)b.grad + row * b.row_stride : nullptr;
    for (int r = 0; r < N; ++r) b.row_sums[row + r] = 0;
    for (int64_t from = 0; from < b.cols; from += FLUSH_VECTORS * LANES) {
      const int64_t to = from + FLUSH_VECTORS * LANES < b.cols ? from + FLUSH_VECTORS * LANES : b.cols;
      strip<N>(b, theta, grad, from, to, acc, b.row_sums + row);
      if (GRADS && b.zero_grad)
        for (int64_t s = 0; s < b.steps; ++s)
          for (int r = 0; r < N; ++r)
            __builtin_memset(grad + s * b.step_stride + r * b.row_stride + from, 0, (to - from) * sizeof(T));
    }
  }

  static void fold(const ScoreBlock& b, const Lane* acc) {
    if (b.inner_stride == 1) {
      for (int64_t k = 0; k < b.fold_trailing; ++k)
        for (int64_t i = 0; i < b.fold_inner; ++i) b.col_sums[i] += (double)acc[k * b.trailing_stride + i];
    } else {
      for (int64_t i = 0; i < b.fold_inner; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < b.fold_trailing; ++k) sum += (double)acc[i * b.inner_stride + k];
        b.col_sums[i] += sum;
      }
    }
  }

  static void run(const ScoreBlock& b) {
    Lane* acc = (Lane*)b.scratch;
    for (int64_t i = 0; i < b.fold_inner; ++i) b.col_sums[i] = 0;
    for (int64_t begin = 0; begin < b.rows; begin += FLUSH_ROWS) {
      const int64_t end = begin + FLUSH_ROWS < b.rows ? begin + FLUSH_ROWS : b.rows;
      __builtin_memset(acc, 0, scratch_bytes(b.cols) / (8 / sizeof(Lane)));
      int64_t row = begin;
      for (; row + GROUP <= end; row += GROUP) group<GROUP>(b, row, acc);
      for (; row < end; ++row) group<1>(b, row, acc);
      fold(b, acc);
    }
  }
};

template <class T>
static ScoreBlockFn pick(Criterion criterion, bool stacked) {
  switch (criterion) {
    case Criterion::abs:
      return stacked ? Pass<T, Criterion::abs, true>::run : Pass<T, Criterion::abs, false>::run;
    case Criterion::signed_:
      return stacked ? Pass<T, Criterion::signed_, true>::run : Pass<T, Criterion::signed_, false>::run;
    case Criterion::square:
      return stacked ? Pass<T, Criterion::square, true>::run : Pass<T, Criterion::square, false>::run;
    default:
      return Pass<T, Criterion::magnitude, false>::run;
  }
}

static ScoreBlockFn pick(Dtype dtype, Criterion criterion, bool stacked) {
  switch (dtype) {
    case Dtype::f32:
      return pick<float>(criterion, stacked);
    case Dtype::bf16:
      return pick<Bf16>(criterion, stacked);
    case Dtype::f16:
      return pick<F16>(criterion, stacked);
    default:
      return pick<double>(criterion, stacked);
  }
}
