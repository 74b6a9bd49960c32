// The kernels, compiled once for each instruction path (path_*.cpp). Every output is one running sum in ascending order of its
// inputs, whatever the number of rows beside it and whichever thread computes it: rows are independent by construction.
#pragma once
#include <math.h>

#include "numbers.h"
#include "tasks.h"

namespace {

using namespace baton;

#if defined(__AVX512F__)
constexpr int kMaxRows = 6;  // 6 x 4 vectors of sums, 4 of weights and a broadcast fit 32 registers
constexpr int kVectors = 4;
#else
constexpr int kMaxRows = 4;  // 4 x 2 and their operands fit 16
constexpr int kVectors = 2;
#endif
constexpr int kVectorsAlone = kPanel / kLanes < 8 ? kPanel / kLanes : 8;  // of a single row

// A single group of rows fetches its panel this many words before it reads them: 30 GB/s of 30 streamed on a Zen 4 core, 1 to 6 rows;
// 8 words 24, 16 words 18.
constexpr int64_t kAheadWords = 4;

// c[row][column] (+)= x[row] . panel[column] for R rows and V vectors of columns; fetches `Lines` of each 256 bytes from `ahead` on.
template <typename N, int R, int V, int Lines>
INLINE void multiply(const uint32_t* const* x, const uint32_t* panel, int64_t num_words, float* c, bool add, const char* ahead) {
  Floats sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * kPanel + v * kLanes) : splat(0.0f);
  const uint32_t* rows[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) rows[r] = x[r];
  for (int64_t k = 0; k < num_words; ++k) {
    const uint32_t* line = panel + k * kPanel;
#pragma GCC unroll 4
    for (int i = 0; i < Lines; ++i) prefetch(ahead + k * (kPanel * 4) + i * 64);
    typename N::Factor b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) b[v] = N::factor(load(line + v * kLanes));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      typename N::Factor a = N::broadcast(rows[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = N::multiply_add(a, b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * kPanel + v * kLanes, sum[r][v]);
}

template <typename N, int R, int Lines>
static void multiply_rows(const uint32_t* const* x, const uint32_t* panel, int64_t num_words, float* c, bool add, int columns, const char* ahead) {
  constexpr int V = R == 1 ? kVectorsAlone : kVectors;
  for (int j = 0; j < columns; j += V * kLanes) {
    if (j == 0)
      multiply<N, R, V, Lines>(x, panel, num_words, c, add, ahead);
    else
      multiply<N, R, V, 0>(x, panel + j, num_words, c + j, add, ahead);
  }
}

template <typename N, int Lines>
INLINE void multiply_some(int num_rows, const uint32_t* const* x, const uint32_t* panel, int64_t num_words, float* c, bool add, int columns, const char* ahead) {
  switch (num_rows) {
    case 1: return multiply_rows<N, 1, Lines>(x, panel, num_words, c, add, columns, ahead);
    case 2: return multiply_rows<N, 2, Lines>(x, panel, num_words, c, add, columns, ahead);
    case 3: return multiply_rows<N, 3, Lines>(x, panel, num_words, c, add, columns, ahead);
    case 4: return multiply_rows<N, 4, Lines>(x, panel, num_words, c, add, columns, ahead);
#if defined(__AVX512F__)
    case 5: return multiply_rows<N, 5, Lines>(x, panel, num_words, c, add, columns, ahead);
    case 6: return multiply_rows<N, 6, Lines>(x, panel, num_words, c, add, columns, ahead);
#endif
  }
}

// Rows in groups of nearly equal size: 8 are 4 + 4, not 6 + 2.
INLINE int next_group(int64_t rows_left) {
  int64_t groups = (rows_left + kMaxRows - 1) / kMaxRows;
  return (int)((rows_left + groups - 1) / groups);
}

// c [num_rows][64] (+)= x . panel, all rows.
template <typename N>
static void multiply_all(const uint32_t* const* x, int64_t num_rows, const uint32_t* panel, int64_t num_words, float* c, bool add, int columns) {
  for (int64_t r = 0; r < num_rows;) {
    int group = next_group(num_rows - r);
    multiply_some<N, 0>(group, x + r, panel, num_words, c + r * kPanel, add, columns, nullptr);
    r += group;
  }
}

// Asks for the keys and values of a tile to come, a few lines at a time: they lie in short runs that the processor does not see
// coming, and asked for all at once they would hold up the tile at hand.
struct Fetch {
  const char* runs[2 * kKeyTile / kRun];
  int num_runs = 0, run_lines = 0, run = 0, line = 0, lines_a_step = 0;

  INLINE void step_of(Fetch& f) {
    for (int i = 0; i < f.lines_a_step && f.run < f.num_runs; ++i) {
      prefetch(f.runs[f.run] + 64 * f.line);
      if (++f.line == f.run_lines) f.line = 0, ++f.run;
    }
  }
};

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

template <typename N>
INLINE void pack_columns(uint32_t* panel, const void* const* rows, int64_t num_in, int columns, Fetch& fetch) {
  int64_t whole = num_in / N::kPerWord, tile_end = whole / kLanes * kLanes, num_words = (num_in + N::kPerWord - 1) / N::kPerWord;
  for (int first = 0; first < columns; first += kLanes) {
    for (int64_t k = 0; k < tile_end; k += kLanes) {
      Fetch::step_of(fetch);
      Words tile[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t* row = (const uint32_t*)rows[first + i];
        tile[i] = row ? load(row + k) : splat_word(0);
      }
      transpose(tile);
      for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kPanel + first, tile[i]);
    }
    for (int i = 0; i < kLanes; ++i) {
      const char* row = (const char*)rows[first + i];
      for (int64_t k = tile_end; k < num_words; ++k) {
        uint32_t word = 0;
        if (row && k < whole) memcpy(&word, row + k * 4, 4);
        if (row && k >= whole) word = N::last_word((const typename N::Stored*)row + num_in - 1);
        panel[k * kPanel + first + i] = word;
      }
    }
  }
}

template <typename N>
static void pack_panel(uint32_t* panel, const void* const* rows, int64_t num_in) {
  Fetch nothing;
  pack_columns<N>(panel, rows, num_in, kPanel, nothing);
}

template <typename N>
INLINE void finish_rows(const LinearTask& t, int64_t panel, int64_t first_row, int num_rows, const float* c) {
  const float* bias = t.linear->bias ? t.linear->bias + panel * kPanel : nullptr;
  if (t.after == After::kSiluMul) {
    constexpr int kHalf = kPanel / 2;
    int64_t first = panel * kHalf, left = t.linear->num_out / 2 - first;
    for (int r = 0; r < num_rows; ++r, c += kPanel) {
      auto* y = (typename N::Stored*)(t.next + (first_row + r) * t.next_stride) + first;
      for (int j = 0; j < kHalf && j < left; j += kLanes) {
        Floats gate = load(c + j), up = load(c + kHalf + j);
        if (bias) gate = gate + load(bias + j), up = up + load(bias + kHalf + j);
        Floats v = silu_times(gate, up);
        if (left - j >= kLanes)
          N::write(y + j, v);
        else
          N::write_part(y + j, v, left - j);
      }
    }
    return;
  }
  int64_t first = panel * kPanel, left = t.linear->num_out - first;
  for (int r = 0; r < num_rows; ++r, c += kPanel) {
    float* y = t.y + (first_row + r) * t.y_stride + first;
    for (int j = 0; j < kPanel && j < left; j += kLanes) {
      int64_t n = left - j;
      Floats v = load(c + j);
      if (bias) v = v + load(bias + j);
      if (n >= kLanes)
        store(y + j, t.after == After::kAdd ? load(y + j) + v : v);
      else
        store_part(y + j, t.after == After::kAdd ? load_part<Floats>(y + j, n) + v : v, n);
    }
  }
}

template <typename N>
static void linear(const LinearTask& t, int64_t panel, int64_t first_row, int64_t num_rows, float* scratch) {
  const Linear& w = *t.linear;
  for (int64_t k = 0; k < w.num_words; k += kKSlice) {
    int64_t num_words = w.num_words - k < kKSlice ? w.num_words - k : kKSlice;
    bool is_last = k + num_words == w.num_words;
    const uint32_t* words = w.words + (panel * w.num_words + k) * kPanel;
    // What is passed over next is fetched meanwhile, as many lines a word as make four of them over all groups of rows: the panels
    // follow each other in memory. A single group is short, it fetches what it needs itself a little later.
    const int64_t groups = (num_rows + kMaxRows - 1) / kMaxRows;
    const char* ahead = (const char*)(groups == 1 ? words + kAheadWords * kPanel : words + num_words * kPanel);
    int lines_left = 4;
    for (int64_t r = 0; r < num_rows;) {
      const int group = next_group(num_rows - r);
      const uint32_t* x[kMaxRows];
      for (int i = 0; i < group; ++i) x[i] = t.x + (first_row + r + i) * t.x_stride + k;
      float* c = scratch + r * kPanel;
      const int lines = groups == 1 ? 4 : groups > 3 ? 1 : 2;
      if (lines_left == 0)
        multiply_some<N, 0>(group, x, words, num_words, c, k != 0, kPanel, nullptr);
      else if (lines == 4)
        multiply_some<N, 4>(group, x, words, num_words, c, k != 0, kPanel, ahead);
      else if (lines == 2)
        multiply_some<N, 2>(group, x, words, num_words, c, k != 0, kPanel, ahead);
      else
        multiply_some<N, 1>(group, x, words, num_words, c, k != 0, kPanel, ahead);
      if (lines_left) lines_left -= lines, ahead += lines * 64;
      if (is_last) finish_rows<N>(t, panel, first_row + r, group, c);
      r += group;
    }
  }
}

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

template <typename N>
static float peak(int64_t num_rounds) {
  uint32_t rows[6 * kPeakWords];  // six different ones: of equal rows the compiler computes one
  alignas(64) uint32_t panel[kPeakWords * kPanel];
  for (int i = 0; i < kPeakWords * kPanel; ++i) panel[i] = 0x3c003c00u + (uint32_t)(num_rounds & i);
  for (int i = 0; i < 6 * kPeakWords; ++i) rows[i] = panel[i];
  const uint32_t* x[6];
  for (int i = 0; i < 6; ++i) x[i] = rows + i * kPeakWords;
  float c[6 * kPanel] = {};
  for (int64_t i = 0; i < num_rounds; ++i) multiply_all<N>(x, 6, panel, kPeakWords, c, true, kPanel);
  float sum = 0;  // of all of them, or the compiler leaves out what nobody reads
  for (float v : c) sum += v;
  return sum;
}

template <typename N>
static Path make_path(const char* name) {
  return Path{name, N::kPerWord == 2, pack_panel<N>, linear<N>, norm<N>, rotary<N>, attention<N>, widen_row<N>, silu_mul<N>, greedy, peak<N>};
}

}  // namespace
