// The kernels, compiled once for each instruction path (path_*.cpp).
#pragma once
#include "attention.h"
#include "draws.h"
#include "linear.h"
#include "rows.h"

namespace {

using namespace baton;

template <typename N>
static float peak(int64_t num_rounds) {
  uint32_t rows[6 * kPeakWords];  // six different ones: of equal rows the compiler computes one
  alignas(64) uint32_t panel[kPeakWords * kPanel];
  for (int i = 0; i < kPeakWords * kPanel; ++i) panel[i] = 0x3c003c00u + (uint32_t)(num_rounds & i);
  for (int i = 0; i < 6 * kPeakWords; ++i) rows[i] = panel[i];
  const uint32_t* x[6];
  for (int i = 0; i < 6; ++i) x[i] = rows + i * kPeakWords;
  float c[6 * kPanel] = {};
  for (int64_t i = 0; i < num_rounds; ++i) multiply_all<N>(x, 6, panel, kPeakWords, c, true);
  float sum = 0;  // of all of them, or the compiler leaves out what nobody reads
  for (float v : c) sum += v;
  return sum;
}

template <typename N>
static Path make_path(const char* name) {
  return Path{name, N::kPerWord == 2, pack_panel<N>, linear<N>, norm<N>, rotary<N>, attention<N>, widen_row<N>, silu_mul<N>, greedy, choose_experts, peak<N>,
              greatest, weigh_logits, above, gather, keep};
}

}  // namespace
