// The two kinds of numbers a network is computed in. A word holds one float or two bfloat16 (lanes.h, tasks.h).
#pragma once
#include "lanes.h"

namespace {

struct Float32 {
  typedef float Stored;
  static constexpr int kPerWord = 1;
  struct Factor {
    Floats v;
  };
  INLINE Factor factor(Words w) { return {(Floats)w}; }
  INLINE Factor broadcast(uint32_t w) { return {(Floats)splat_word(w)}; }
  INLINE Floats multiply_add(Factor a, Factor b, Floats c) { return fma(a.v, b.v, c); }
  INLINE Floats read(const float* p) { return load(p); }
  INLINE Floats read_part(const float* p, int64_t n) { return load_part<Floats>(p, n); }
  INLINE void write(float* p, Floats v) { store(p, v); }
  INLINE void write_part(float* p, Floats v, int64_t n) { store_part(p, v, n); }
  INLINE uint32_t last_word(const float*) { return 0; }
  // Words of the values [d, d + 2 kLanes) of a row, of which `left` are there.
  INLINE void pair(const float* row, const float*, int64_t d, int64_t left, Words* low, Words* high) {
    const auto* words = (const uint32_t*)row + d;
    *low = load_up_to<Words>(words, left), *high = load_up_to<Words>(words + kLanes, left - kLanes);
  }
  INLINE void restore_pair(int64_t, Floats*, Floats*) {}
};

struct BFloat16 {
  typedef uint16_t Stored;
  static constexpr int kPerWord = 2;
#if defined(__AVX512BF16__)
  struct Factor {
    Words v;
  };
  INLINE Factor factor(Words w) { return {w}; }
  INLINE Factor broadcast(uint32_t w) { return {splat_word(w)}; }
  INLINE Floats multiply_add(Factor a, Factor b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512i)a.v, (__m512bh)(__m512i)b.v);
  }
#else
  struct Factor {
    Floats even, odd;
  };
  INLINE Factor factor(Words w) { return {(Floats)(w << 16), (Floats)(w & 0xffff0000u)}; }
  INLINE Factor broadcast(uint32_t w) { return {(Floats)splat_word(w << 16), (Floats)splat_word(w & 0xffff0000u)}; }
  INLINE Floats multiply_add(Factor a, Factor b, Floats c) { return fma(a.odd, b.odd, fma(a.even, b.even, c)); }
#endif
  INLINE Floats read(const uint16_t* p) { return widen(load(p)); }
  INLINE Floats read_part(const uint16_t* p, int64_t n) { return widen(load_part<Halves>(p, n)); }
  INLINE void write(uint16_t* p, Floats v) { store(p, narrow(v)); }
  INLINE void write_part(uint16_t* p, Floats v, int64_t n) { store_part(p, narrow(v), n); }
  INLINE uint32_t last_word(const uint16_t* p) { return *p; }  // of an odd number of values: the last one and a zero
  // Words of the values [d, d + 2 kLanes) of two rows, of which `left` are there (an even number): in the order of `interleave`, or in
  // their own where they fill a single vector.
  INLINE void pair(const uint16_t* even, const uint16_t* odd, int64_t d, int64_t left, Words* low, Words* high) {
    even += d, odd += d;
    if (left > kLanes) return interleave(load_up_to<Words>((const uint32_t*)even, left / 2), load_up_to<Words>((const uint32_t*)odd, left / 2), low, high);
    *low = __builtin_convertvector(load_up_to<Halves>(even, left), Words) | __builtin_convertvector(load_up_to<Halves>(odd, left), Words) << 16;
    *high = Words{};
  }
  INLINE void restore_pair(int64_t left, Floats* low, Floats* high) {
    if (left > kLanes) restore(low, high);
  }
};

}  // namespace
