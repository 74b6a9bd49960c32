// Vectors of the path being compiled: `Floats` of kLanes lanes, with the few operations the kernels need.
// Written with the compiler's vector types; intrinsics only where there is an instruction to name. Everything is static.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

#define INLINE static inline __attribute__((always_inline))

INLINE Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Words load(const uint32_t* p) {
  Words v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE Halves load(const uint16_t* p) {
  Halves v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename T, typename V>
INLINE void store(T* p, V v) {
  memcpy(p, &v, sizeof v);
}

INLINE Floats splat(float x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Floats)_mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}
INLINE Words splat_word(uint32_t x) {
#if defined(__AVX512F__)
  return (Words)_mm512_set1_epi32((int)x);
#elif defined(__AVX2__)
  return (Words)_mm256_set1_epi32((int)x);
#else
  return Words{x, x, x, x};
#endif
}

// a * b + c, rounded once where the path has the instruction. Contraction is off, so this is the only place that decides.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// b where one of them is not a number.
INLINE Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_max_ps((__mmask16)-1, (__m512)a, (__m512)b);  // gcc warns of its own unmasked one
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

INLINE Floats widen(Halves h) { return (Floats)(__builtin_convertvector(h, Words) << 16); }

// To bfloat16, to nearest even; a NaN stays one.
INLINE Halves narrow(Floats v) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  Words bits = (Words)v;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Mask is_nan = v != v;
  return __builtin_convertvector((Words)(is_nan ? (Mask)splat_word(0x7fc0u) : (Mask)rounded), Halves);
#endif
}

// e^x to about 1e-7 relative, for x <= 88 (Cephes expf); below -87 it stays at e^-87.
INLINE Floats exponential(Floats x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats shifted = fma(x, splat(1.44269504088896341f), magic);
  Floats n = shifted - magic;
  Floats r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats y = splat(1.9875691500e-4f);
  y = fma(y, r, splat(1.3981999507e-3f));
  y = fma(y, r, splat(8.3334519073e-3f));
  y = fma(y, r, splat(4.1665795894e-2f));
  y = fma(y, r, splat(1.6666665459e-1f));
  y = fma(y, r, splat(5.0000001201e-1f));
  y = fma(y, r * r, r + splat(1.0f));
  Words power = ((Words)shifted + 127u - 0x4b400000u) << 23;
  return y * (Floats)power;
}

// 2^x for x <= 1, to about 2e-7 relative (Cephes exp2f) or, roughly, to 3e-6 (a minimax polynomial that is 1 at 0): below what bfloat16
// tells apart. Below -125 it is next to nothing or 0.
template <bool IsRough>
INLINE Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
  const Floats n = (Floats)_mm512_maskz_roundscale_ps((__mmask16)-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT), r = x - n;
#else
  x = maximum(splat(-125.0f), x);
  const Floats shifted = x + splat(12582912.0f), r = x - (shifted - splat(12582912.0f));
#endif
  Floats y = splat(IsRough ? 9.582853108e-3f : 1.535336188319500e-4f);
  if (IsRough) {
    y = fma(y, r, splat(5.590642468e-2f));
    y = fma(y, r, splat(2.402409861e-1f));
    y = fma(y, r, splat(6.931241934e-1f));
  } else {
    y = fma(y, r, splat(1.339887440266574e-3f));
    y = fma(y, r, splat(9.618437357674640e-3f));
    y = fma(y, r, splat(5.550332471162809e-2f));
    y = fma(y, r, splat(2.402264791363012e-1f));
    y = fma(y, r, splat(6.931472028550421e-1f));
  }
  y = fma(y, r, splat(1.0f));
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_scalef_ps((__mmask16)-1, (__m512)y, (__m512)n);
#else
  return (Floats)((Words)y + ((Words)shifted << 23));
#endif
}

INLINE Floats silu_times(Floats gate, Floats up) { return gate / (splat(1.0f) + exponential(-gate)) * up; }

// The first n of the lanes from p; zeros beyond, where nothing is read.
template <typename V, typename T>
INLINE V load_part(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (V)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
  else
    return (V)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
#else
  T all[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = p[i];
  return load(all);
#endif
}
template <typename T, typename V>
INLINE void store_part(T* p, V v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, (__mmask16)((1u << n) - 1), (__m512i)v);
  else
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
#else
  T all[kLanes];
  store(all, v);
  for (int64_t i = 0; i < n; ++i) p[i] = all[i];
#endif
}

// The first n of the lanes, which may be all of them or, below 1, none.
template <typename V, typename T>
INLINE V load_up_to(const T* p, int64_t n) {
#if defined(__AVX512F__)
  return load_part<V>(p, n < 0 ? 0 : n < kLanes ? n : kLanes);
#else
  return n >= kLanes ? (V)load(p) : load_part<V>(p, n < 0 ? 0 : n);
#endif
}

// The greatest lane.
INLINE float greatest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float x[kLanes];
  store(x, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
#endif
}

// Two vectors of 16-bit values side by side: low and high have a's in the lower and b's in the upper halves of their words. Which word
// lies where is the processor's choice; `restore` brings lanes computed from low and high into the order of a and b.
INLINE void interleave(Words a, Words b, Words* low, Words* high) {
#if defined(__AVX512F__)
  *low = (Words)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b), *high = (Words)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  *low = (Words)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b), *high = (Words)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#else
  Halves x[2], y[2];
  memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
  *low = __builtin_convertvector(x[0], Words) | __builtin_convertvector(y[0], Words) << 16;
  *high = __builtin_convertvector(x[1], Words) | __builtin_convertvector(y[1], Words) << 16;
#endif
}
INLINE void restore(Floats* low, Floats* high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __m512 a = (__m512)*low, b = (__m512)*high;
  *low = (Floats)_mm512_permutex2var_ps(a, first, b), *high = (Floats)_mm512_permutex2var_ps(a, second, b);
#elif defined(__AVX2__)
  const __m256 a = (__m256)*low, b = (__m256)*high;
  *low = (Floats)_mm256_permute2f128_ps(a, b, 0x20), *high = (Floats)_mm256_permute2f128_ps(a, b, 0x31);
#else
  (void)low, (void)high;  // they are
#endif
}

// Sixteen running sums on every path, so that a sum over lanes has one order whatever the width.
struct Sixteen {
  Floats part[16 / kLanes];
};
INLINE float total(const Sixteen& sums) {
  float x[16];
  memcpy(x, &sums, sizeof x);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

#if defined(__AVX512F__)
// r[i] lane j becomes r[j] lane i.
INLINE void transpose(Words* rows) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = (__m512i)rows[i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    __m512i even0 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), even1 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    __m512i odd0 = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), odd1 = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    rows[j] = (Words)_mm512_shuffle_i32x4(even0, even1, 0x88);
    rows[4 + j] = (Words)_mm512_shuffle_i32x4(odd0, odd1, 0x88);
    rows[8 + j] = (Words)_mm512_shuffle_i32x4(even0, even1, 0xdd);
    rows[12 + j] = (Words)_mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#elif defined(__AVX2__)
INLINE void transpose(Words* rows) {
  __m256i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = (__m256i)rows[i];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = (Words)_mm256_permute2x128_si256(r[j], r[4 + j], 0x20);
    rows[4 + j] = (Words)_mm256_permute2x128_si256(r[j], r[4 + j], 0x31);
  }
}
#else
INLINE void transpose(Words* rows) {
  uint32_t x[kLanes][kLanes];
  memcpy(x, rows, sizeof x);
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j) rows[i][j] = x[j][i];
}
#endif

INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
