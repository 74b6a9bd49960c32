// What drawing a token reads of a row of logits. Every operation is a single rounded one and every sum is exact, so the results have the
// same bits on all paths and in kernels/sampling/reference.py.
#pragma once
#include <math.h>

#include "lanes.h"
#include "tasks.h"

namespace {

using namespace baton;

typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef float HalfFloats __attribute__((vector_size(2 * kLanes)));

struct DoublePair {
  Doubles low, high;
};
INLINE DoublePair to_doubles(Floats v) {
#if defined(__AVX512F__)
  return {(Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)), (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))};
#else
  HalfFloats half[2];
  memcpy(half, &v, sizeof v);
  return {__builtin_convertvector(half[0], Doubles), __builtin_convertvector(half[1], Doubles)};
#endif
}
INLINE void store_floats(float* p, DoublePair v) {
  store(p, __builtin_convertvector(v.low, HalfFloats));
  store(p + kLanes / 2, __builtin_convertvector(v.high, HalfFloats));
}
INLINE double total(DoublePair p) {
  double sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += p.low[i] + p.high[i];
  return sum;
}
INLINE Floats where(Mask mask, Floats v) { return (Floats)(mask & (Mask)v); }

// e^x of x <= 0 as `exponential` (lanes.h), but without fused operations, which not every path has.
INLINE Floats likelihood(Floats x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const Floats magic = splat(12582912.0f);
  Floats shifted = x * splat(1.44269504088896341f) + magic;
  Floats n = shifted - magic;
  Floats r = n * splat(-0.693359375f) + x;
  r = n * splat(2.12194440e-4f) + r;
  Floats y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + (r + splat(1.0f));
  Words power = ((Words)shifted + 127u - 0x4b400000u) << 23;
  return y * (Floats)power;
}

static float greatest(const float* x, int64_t size) {
  Floats most = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) most = maximum(load(x + i), most);
  float top = -INFINITY;
  for (int j = 0; j < kLanes; ++j) top = most[j] > top ? most[j] : top;
  for (; i < size; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// weights[i] = e^((logits[i] - top) * inverse_temperature) in multiples of kWeightUnit; masses: their sums by kMassBlock.
static double weigh_logits(const float* logits, int64_t size, float top, float inverse_temperature, float* weights, double* masses) {
  const Doubles magic = Doubles{} + kWeightUnit * 6755399441055744.0;  // 1.5 * 2^52 units: adding it rounds to a whole number of them
  auto weigh = [&](Floats x) {
    DoublePair w = to_doubles(likelihood((x - splat(top)) * splat(inverse_temperature)));
    w.low = (w.low + magic) - magic, w.high = (w.high + magic) - magic;
    return w;
  };
  double all = 0;
  for (int64_t first = 0; first < size; first += kMassBlock) {
    const int64_t end = size - first < kMassBlock ? size : first + kMassBlock;
    DoublePair sum = {};
    double rest = 0;
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      DoublePair w = weigh(load(logits + i));
      sum.low += w.low, sum.high += w.high;
      store_floats(weights + i, w);
    }
    if (i < end) {
      float last[kLanes];
      store_floats(last, weigh(load_part<Floats>(logits + i, end - i)));
      for (int64_t j = i; j < end; ++j) rest += weights[j] = last[j - i];
    }
    all += masses[first / kMassBlock] = total(sum) + rest;
  }
  return all;
}

// Of the logits above `limit` how many there are, what they weigh and the least of them; and the greatest of the others.
static Above above(const float* logits, const float* weights, int64_t size, float limit) {
  DoublePair mass = {};
  Mask count = {};
  Floats least = splat(INFINITY), greatest_other = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats x = load(logits + i);
    Mask is_above = x > splat(limit);
    DoublePair w = to_doubles(where(is_above, load(weights + i)));
    mass.low += w.low, mass.high += w.high;
    count -= is_above;
    Floats high = is_above ? x : splat(INFINITY), low = is_above ? splat(-INFINITY) : x;
    least = high < least ? high : least;
    greatest_other = low > greatest_other ? low : greatest_other;
  }
  Above result{0, total(mass), INFINITY, -INFINITY};
  for (int j = 0; j < kLanes; ++j) {
    result.count += count[j];
    result.least = least[j] < result.least ? least[j] : result.least;
    result.greatest_other = greatest_other[j] > result.greatest_other ? greatest_other[j] : result.greatest_other;
  }
  for (; i < size; ++i) {
    if (logits[i] > limit) {
      ++result.count, result.mass += weights[i];
      result.least = logits[i] < result.least ? logits[i] : result.least;
    } else {
      result.greatest_other = logits[i] > result.greatest_other ? logits[i] : result.greatest_other;
    }
  }
  return result;
}

// Copies what lies in (low, high] to to_logits and to_weights, which have room for kLanesMax more than that; returns how many.
static int64_t gather(const float* logits, const float* weights, int64_t size, float low, float high, float* to_logits, float* to_weights) {
  int64_t found = 0, i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats x = load(logits + i);
#if defined(__AVX512F__)
    const __mmask16 inside = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(low), _CMP_GT_OQ) & _mm512_cmp_ps_mask((__m512)x, (__m512)splat(high), _CMP_LE_OQ);
    if (!inside) continue;
    store(to_logits + found, (Floats)_mm512_maskz_compress_ps(inside, (__m512)x));
    store(to_weights + found, (Floats)_mm512_maskz_compress_ps(inside, (__m512)load(weights + i)));
    found += __builtin_popcount(inside);
#else
    Mask inside = (x > splat(low)) & (x <= splat(high));
    uint64_t words[sizeof inside / 8], any = 0;
    memcpy(words, &inside, sizeof inside);
    for (uint64_t word : words) any |= word;
    if (!any) continue;
    for (int j = 0; j < kLanes; ++j) to_logits[found] = logits[i + j], to_weights[found] = weights[i + j], found -= inside[j];
#endif
  }
  for (; i < size; ++i) to_logits[found] = logits[i], to_weights[found] = weights[i], found += logits[i] > low && logits[i] <= high;
  return found;
}

// Sets weights to 0 whose logit is below `least_logit` or that are themselves below `least_weight`; returns the logits equal to it.
static int64_t keep(const float* logits, float* weights, int64_t size, float least_logit, float least_weight, double* masses) {
  int64_t num_equal = 0;
  for (int64_t first = 0; first < size; first += kMassBlock) {
    const int64_t end = size - first < kMassBlock ? size : first + kMassBlock;
    DoublePair sum = {};
    Mask equal = {};
    double rest = 0;
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      Floats x = load(logits + i), w = load(weights + i);
      w = where((x >= splat(least_logit)) & (w >= splat(least_weight)), w);
      equal -= x == splat(least_logit);
      store(weights + i, w);
      DoublePair wide = to_doubles(w);
      sum.low += wide.low, sum.high += wide.high;
    }
    for (int j = 0; j < kLanes; ++j) num_equal += equal[j];
    for (; i < end; ++i) {
      if (!(logits[i] >= least_logit && weights[i] >= least_weight)) weights[i] = 0;
      num_equal += logits[i] == least_logit;
      rest += weights[i];
    }
    masses[first / kMassBlock] = total(sum) + rest;
  }
  return num_equal;
}

}  // namespace
