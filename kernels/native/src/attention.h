// Attention of some tokens of one sequence over its blocks: tiles of keys and values are packed as panels of a linear.
#pragma once
#include <math.h>

#include "linear.h"

namespace {

using namespace baton;

template <typename N>
INLINE Fetch fetch_tile(const AttentionTask& t, const AttentionItem& item, int kv_head, int64_t tile, int num_steps) {
  const int64_t context = item.start + item.num_tokens, run_bytes = kRun * t.head_dim * (int64_t)sizeof(typename N::Stored);
  const int64_t head_bytes = t.block_size / kRun * run_bytes;
  Fetch fetch;
  for (int64_t position = tile; position < tile + kKeyTile && position < context; position += kRun) {
    const char* keys = t.kv + (int64_t)item.table[position / t.block_size] * t.block_bytes + kv_head * head_bytes + position % t.block_size / kRun * run_bytes;
    fetch.runs[fetch.num_runs++] = keys;
    fetch.runs[fetch.num_runs++] = keys + t.num_kv_heads * head_bytes;
  }
  fetch.run_lines = (int)((run_bytes + 63) / 64);
  fetch.lines_a_step = (fetch.run_lines * fetch.num_runs + num_steps - 1) / num_steps;
  return fetch;
}

// Values of num_keys rows as panels [dim / 64][key word][64]; a missing second key of a word is zero.
template <typename N>
INLINE void pack_values(uint32_t* panels, const typename N::Stored* const* rows, int num_keys, int head_dim, Fetch& fetch) {
  int num_words = (num_keys + N::kPerWord - 1) / N::kPerWord;
  for (int word = 0; word < num_words; ++word) {
    Fetch::step_of(fetch);
    for (int d = 0; d < head_dim; d += kLanes) {
      int n = head_dim - d;
      uint32_t* to = panels + ((d / kPanel) * (kKeyTile / N::kPerWord) + word) * kPanel + d % kPanel;
      if constexpr (N::kPerWord == 1) {
        store(to, (Words)(n >= kLanes ? load(rows[word] + d) : load_part<Floats>(rows[word] + d, n)));
      } else {
        const uint16_t *low = rows[2 * word] + d, *high = 2 * word + 1 < num_keys ? rows[2 * word + 1] + d : nullptr;
        Halves a = n >= kLanes ? load(low) : load_part<Halves>(low, n);
        Halves b = !high ? Halves{} : n >= kLanes ? load(high) : load_part<Halves>(high, n);
        store(to, __builtin_convertvector(a, Words) | (__builtin_convertvector(b, Words) << 16));
      }
    }
  }
}

// One row of scores to weights e^(scale * (score - max)), as words; the running maximum and sums go along.
// Keys in [first, end) of the tile are seen. Returns what the sums so far are multiplied with.
template <typename N>
INLINE float weigh(float* scores, typename N::Stored* weights, int first, int end, float scale, float* highest, Sixteen* sums) {
  const float before = *highest;
  float top = before;
  if (first > 0 || end < kKeyTile)
    for (int i = 0; i < kKeyTile; ++i)
      if (i < first || i >= end) scores[i] = -INFINITY;
  Floats most = load(scores);
  for (int i = kLanes; i < kKeyTile; i += kLanes) most = maximum(most, load(scores + i));
  for (int i = 0; i < kLanes; ++i) top = most[i] * scale > top ? most[i] * scale : top;
  *highest = top;
  Floats kept = exponential(splat(before - top));
  float factor = before == top ? 1.0f : kept[0];
  if (factor != 1.0f)
    for (int j = 0; j < 16 / kLanes; ++j) sums->part[j] = sums->part[j] * splat(factor);
  for (int i = 0; i < kKeyTile; i += kLanes) {
    Floats score = load(scores + i);
    Floats weight = exponential(fma(score, splat(scale), splat(-top)));
    weight = score == splat(-INFINITY) ? splat(0.0f) : weight;
    int j = i % 16 / kLanes;
    sums->part[j] = sums->part[j] + weight;
    N::write(weights + i, weight);
  }
  return factor;
}

INLINE int64_t first_tile(const AttentionTask& t, const AttentionItem& item) {
  return t.window && item.start >= t.window ? (item.start - t.window + 1) / kKeyTile * kKeyTile : 0;
}

// Some tokens of one sequence and the heads of one group: softmax over key tiles in ascending order (Milakov & Gimelshein, 2018).
template <typename N>
static void attention(const AttentionTask& t, int64_t index, int kv_head, float* scratch) {
  typedef typename N::Stored Stored;
  const AttentionItem& item = t.items[index];
  const int group = t.num_heads / t.num_kv_heads, num_rows = item.num_tokens * group, dim = t.head_dim;
  const int dim_words = dim / N::kPerWord, dim_panels = (dim + kPanel - 1) / kPanel, weight_words = kKeyTile / N::kPerWord;
  uint32_t* keys = (uint32_t*)scratch;                               // [dim words][64]
  uint32_t* values = keys + (dim_words + 1) * kPanel;                // [dim panels][key words][64]
  float* scores = (float*)(values + dim_panels * kKeyTile * kPanel); // [rows][64]
  Stored* weights = (Stored*)(scores + kTileRows * kPanel);          // [rows][64]
  float* out = (float*)weights + kTileRows * kPanel;                 // [dim panels][rows][64]
  float highest[kTileRows];
  Sixteen sums[kTileRows];
  const uint32_t *q[kTileRows], *w[kTileRows];
  for (int r = 0; r < num_rows; ++r) {
    const Stored* row = (const Stored*)(t.q + (item.first_row + r / group) * t.q_stride);
    q[r] = (const uint32_t*)(row + (kv_head * group + r % group) * dim);
    w[r] = (const uint32_t*)(weights + r * kKeyTile);
    highest[r] = -1e30f;
    sums[r] = Sixteen{};
  }
  memset(out, 0, sizeof(float) * dim_panels * num_rows * kPanel);
  const int64_t context = item.start + item.num_tokens;
  const int64_t head_stride = t.block_size * dim, value_offset = t.num_kv_heads * head_stride;
  const int64_t oldest = t.window && item.start >= t.window ? item.start - t.window + 1 : 0;
  for (int64_t tile = first_tile(t, item); tile < context; tile += kKeyTile) {
    const int num_keys = (int)(context - tile < kKeyTile ? context - tile : kKeyTile);
    const int begin = tile < oldest ? (int)(oldest - tile) : 0;  // earlier blocks may be gone: their slots are not read
    const Stored* value_rows[kKeyTile];
    const void* key_rows[kKeyTile];
    static const Stored zeros[kMaxHeadDim] = {};
    for (int run = 0; run < kKeyTile; run += kRun) {  // of keys within one block
      const Stored* row = nullptr;
      if (run < num_keys && run + kRun > begin) {
        const int64_t position = tile + run;
        row = (const Stored*)(t.kv + (int64_t)item.table[position / t.block_size] * t.block_bytes) + kv_head * head_stride + position % t.block_size * dim;
      }
      for (int i = run; i < run + kRun; ++i) {
        const bool is_read = i >= begin && i < num_keys;
        const Stored* key = row + (i - run) * dim;
        key_rows[i] = is_read ? key : nullptr;
        value_rows[i] = is_read ? key + value_offset : zeros;
      }
    }
    const int runs_end = (num_keys + kRun - 1) / kRun * kRun;  // what lies beyond is hidden, whatever it holds
    const int num_steps = (runs_end / kLanes) * (dim_words / kLanes) + (num_keys + N::kPerWord - 1) / N::kPerWord;
    Fetch fetch;
    if (tile + kKeyTile < context)
      fetch = fetch_tile<N>(t, item, kv_head, tile + kKeyTile, num_steps);
    else if (kv_head + 1 < t.num_kv_heads)  // the piece this thread most likely computes next
      fetch = fetch_tile<N>(t, item, kv_head + 1, first_tile(t, item), num_steps);
    else if (index + 1 < t.num_items)
      fetch = fetch_tile<N>(t, t.items[index + 1], 0, first_tile(t, t.items[index + 1]), num_steps);
    pack_columns<N>(keys, key_rows, dim, runs_end, fetch);
    pack_values<N>(values, value_rows, num_keys, dim, fetch);
    const int columns = num_keys <= kPanel / 2 ? kPanel / 2 : kPanel;
    multiply_all<N>(q, num_rows, keys, dim_words, scores, false, columns);
    bool is_rescaled = false;
    float factors[kTileRows];
    for (int r = 0; r < num_rows; ++r) {
      int64_t position = item.start + r / group;
      int64_t first = t.window ? position - t.window + 1 - tile : 0;
      int64_t end = position + 1 - tile;
      first = first < 0 ? 0 : first > kKeyTile ? kKeyTile : first;
      end = end < 0 ? 0 : end > num_keys ? num_keys : end;
      factors[r] = weigh<N>(scores + r * kPanel, weights + r * kKeyTile, (int)first, (int)end, t.scale, &highest[r], &sums[r]);
      is_rescaled |= factors[r] != 1.0f;
    }
    const int num_words = (num_keys + N::kPerWord - 1) / N::kPerWord;
    for (int p = 0; p < dim_panels; ++p) {
      float* part = out + p * num_rows * kPanel;
      if (is_rescaled)
        for (int r = 0; r < num_rows; ++r)
          for (int j = 0; j < kPanel; j += kLanes) store(part + r * kPanel + j, load(part + r * kPanel + j) * splat(factors[r]));
      int width = dim - p * kPanel < kPanel / 2 ? kPanel / 2 : kPanel;
      multiply_all<N>(w, num_rows, values + p * weight_words * kPanel, num_words, part, true, width);
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    Floats scale = splat(1.0f / total(sums[r]));
    Stored* y = (Stored*)(t.out + (item.first_row + r / group) * t.out_stride) + (kv_head * group + r % group) * dim;
    for (int d = 0; d < dim; d += kLanes) {
      Floats v = load(out + (d / kPanel * num_rows + r) * kPanel + d % kPanel) * scale;
      if (dim - d >= kLanes)
        N::write(y + d, v);
      else
        N::write_part(y + d, v, dim - d);
    }
  }
}

}  // namespace
