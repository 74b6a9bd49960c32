// From rows of logits to tokens: the contract and the definition are those of kernels/sampling/reference.py, bit for bit.
#pragma once
#include <vector>

#include "baton_native.h"
#include "tasks.h"

namespace baton {

// What one thread needs to draw; nothing is kept from one draw to the next.
struct DrawScratch {
  std::vector<float> adjusted, weights, few, sample_logits, sample_weights;
  std::vector<double> masses;
  std::vector<uint32_t> counts;  // all 0 between draws
};

// Throws std::runtime_error where a draw names a token outside the vocabulary.
void check_draw(const BatonDraw& draw, int64_t vocab_size);
int64_t draw_token(const Path& path, const float* logits, int64_t vocab_size, const BatonDraw& draw, DrawScratch* scratch);

}  // namespace baton
