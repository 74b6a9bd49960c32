// The small operations on single rows: norms, rotary embedding, activations, the greatest logit.
#pragma once
#include <math.h>

#include "numbers.h"
#include "tasks.h"

namespace {

using namespace baton;

// 1 / sqrt(mean(x^2) + eps)
INLINE float norm_scale(const float* x, int64_t size, float eps) {
  Sixteen sums = {};
  int64_t i = 0;
  for (; i + 16 <= size; i += 16)
    for (int j = 0; j < 16 / kLanes; ++j) {
      Floats v = load(x + i + j * kLanes);
      sums.part[j] = fma(v, v, sums.part[j]);
    }
  for (int j = 0; i < size; i += kLanes, ++j) {
    Floats v = size - i >= kLanes ? load(x + i) : load_part<Floats>(x + i, size - i);
    sums.part[j] = fma(v, v, sums.part[j]);
  }
  return 1.0f / sqrtf(total(sums) / (float)size + eps);
}

template <typename N>
static void norm(const NormTask& t, int64_t row) {
  const float* x = t.x + (t.rows ? t.rows[row] : row) * t.x_stride;
  auto* y = (typename N::Stored*)(t.y + row * t.y_stride);
  Floats scale = splat(norm_scale(x, t.size, t.eps));
  int64_t i = 0;
  for (; i + kLanes <= t.size; i += kLanes) N::write(y + i, load(x + i) * scale * load(t.weight + i));
  if (int64_t n = t.size - i) N::write_part(y + i, load_part<Floats>(x + i, n) * scale * load_part<Floats>(t.weight + i, n), n);
}

// Norm (if any) and turn one head, in place.
INLINE void turn_head(float* x, const float* weight, float eps, const float* cosines, int head_dim) {
  if (weight) {
    Floats scale = splat(norm_scale(x, head_dim, eps));
    int i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) store(x + i, load(x + i) * scale * load(weight + i));
    if (int n = head_dim - i) store_part(x + i, load_part<Floats>(x + i, n) * scale * load_part<Floats>(weight + i, n), n);
  }
  int half = head_dim / 2, i = 0;
  const float* sines = cosines + half;
  for (; i + kLanes <= half; i += kLanes) {
    Floats a = load(x + i), b = load(x + half + i), cos = load(cosines + i), sin = load(sines + i);
    store(x + i, fma(a, cos, -(b * sin)));
    store(x + half + i, fma(b, cos, a * sin));
  }
  if (int n = half - i) {
    Floats a = load_part<Floats>(x + i, n), b = load_part<Floats>(x + half + i, n);
    Floats cos = load_part<Floats>(cosines + i, n), sin = load_part<Floats>(sines + i, n);
    store_part(x + i, fma(a, cos, -(b * sin)), n);
    store_part(x + half + i, fma(b, cos, a * sin), n);
  }
}

template <typename N>
INLINE void write_row(typename N::Stored* y, const float* x, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) N::write(y + i, load(x + i));
  if (int64_t n = size - i) N::write_part(y + i, load_part<Floats>(x + i, n), n);
}

template <typename N>
static void rotary(const RotaryTask& t, int64_t row) {
  typedef typename N::Stored Stored;
  float* x = t.qkv + row * t.qkv_stride;
  const float* cosines = t.cos_sin + row * t.head_dim;
  for (int head = 0; head < t.num_heads; ++head, x += t.head_dim) turn_head(x, t.q_norm, t.eps, cosines, t.head_dim);
  write_row<N>((Stored*)(t.q + row * t.q_stride), x - t.num_heads * t.head_dim, t.num_heads * t.head_dim);
  int64_t slot = t.slots[row];
  auto* block = (Stored*)(t.kv + slot / t.block_size * t.block_bytes) + slot % t.block_size * t.head_dim;
  int64_t head_stride = t.block_size * t.head_dim;
  for (int head = 0; head < t.num_kv_heads; ++head, x += t.head_dim) {
    turn_head(x, t.k_norm, t.eps, cosines, t.head_dim);
    write_row<N>(block + head * head_stride, x, t.head_dim);
  }
  for (int head = 0; head < t.num_kv_heads; ++head, x += t.head_dim) write_row<N>(block + (t.num_kv_heads + head) * head_stride, x, t.head_dim);
}

template <typename N>
static void widen_row(float* y, const void* x, int64_t size) {
  auto* from = (const typename N::Stored*)x;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(y + i, N::read(from + i));
  if (int64_t n = size - i) store_part(y + i, N::read_part(from + i, n), n);
}

template <typename N>
static void silu_mul(const float* gate, const float* up, uint32_t* y, int64_t size) {
  auto* to = (typename N::Stored*)y;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) N::write(to + i, silu_times(load(gate + i), load(up + i)));
  if (int64_t n = size - i) N::write_part(to + i, silu_times(load_part<Floats>(gate + i, n), load_part<Floats>(up + i, n)), n);
}

static int64_t greedy(const float* x, int64_t size) {
  Floats most = splat(-INFINITY);
  Mask is_odd = {};  // infinite or not a number: x - x is not 0
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Floats v = load(x + i);
    most = maximum(v, most);
    is_odd |= (Mask)((v - v) != splat(0.0f));
  }
  float top = -INFINITY;
  int odd = 0;
  for (int j = 0; j < kLanes; ++j) {
    top = most[j] > top ? most[j] : top;
    odd |= is_odd[j];
  }
  for (; i < size; ++i) {
    top = x[i] > top ? x[i] : top;
    odd |= !(x[i] - x[i] == 0.0f);
  }
  if (odd) return -1;
  for (i = 0; x[i] != top; ++i) {
  }
  return i;
}

// Softmax over all experts, then the likeliest of them. Whatever the logits hold, the experts are different and in range; where they
// are not finite the weights are not numbers.
static void choose_experts(const ChoiceTask& t, int64_t row, float* scratch) {
  const float* logits = t.logits + row * t.num_experts;
  float top = -INFINITY;
  for (int64_t e = 0; e < t.num_experts; ++e) top = logits[e] > top ? logits[e] : top;
  Sixteen sums = {};
  for (int64_t e = 0, j = 0; e < t.num_experts; e += kLanes, j = (j + 1) % (16 / kLanes)) {
    const int64_t n = t.num_experts - e;
    Floats x = (n >= kLanes ? load(logits + e) : load_part<Floats>(logits + e, n)) - splat(top);
    Floats likely = x < splat(-87.0f) ? splat(0.0f) : exponential(x);
    if (n >= kLanes)
      store(scratch + e, likely);
    else
      store_part(scratch + e, likely, n), likely = load_part<Floats>(scratch + e, n);
    sums.part[j] = sums.part[j] + likely;
  }
  const float sum = total(sums);
  for (int64_t e = 0; e < t.num_experts; ++e) scratch[e] = scratch[e] >= 0.0f ? scratch[e] : 0.0f;
  int32_t* experts = t.experts + row * t.num_chosen;
  float* weights = t.weights + row * t.num_chosen;
  for (int64_t n = 0; n < t.num_chosen; ++n) {
    int32_t best = 0;
    for (int32_t e = 1; e < t.num_experts; ++e) best = scratch[e] > scratch[best] ? e : best;
    const float weight = scratch[best] / sum;
    scratch[best] = -1.0f;
    int64_t at = n;  // among those before it, which stand in order of id
    for (; at > 0 && experts[at - 1] > best; --at) experts[at] = experts[at - 1], weights[at] = weights[at - 1];
    experts[at] = best, weights[at] = weight;
  }
  if (!t.normalize) return;
  float chosen = weights[0];
  for (int64_t n = 1; n < t.num_chosen; ++n) chosen += weights[n];
  for (int64_t n = 0; n < t.num_chosen; ++n) weights[n] /= chosen;
}

}  // namespace
