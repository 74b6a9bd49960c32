// Packed weights and what is multiplied with them: the register tile, the panels it reads, and a linear of one panel.
// Every output is one running sum in ascending order of its inputs, whatever the number of rows beside it and whichever thread
// computes it: rows are independent by construction.
#pragma once
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

constexpr float kAll[6] = {1, 1, 1, 1, 1, 1};

// c[row][column] = kept[row] * c[row][column] + x[row] . panel[column] for R rows and V vectors of columns; kept null: c is not read.
// Fetches `Lines` lines of 64 bytes a word meanwhile, in the order they lie, from `ahead` on.
template <typename N, int R, int V, int Lines>
INLINE void multiply(const uint32_t* const* x, const uint32_t* panel, int64_t num_words, float* c, const float* kept, const char* ahead) {
  Floats sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = kept ? load(c + r * kPanel + v * kLanes) * splat(kept[r]) : splat(0.0f);
  const uint32_t* rows[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) rows[r] = x[r];
  for (int64_t k = 0; k < num_words; ++k) {
    const uint32_t* line = panel + k * kPanel;
#pragma GCC unroll 4
    for (int i = 0; i < Lines; ++i) prefetch(ahead + (k * Lines + i) * 64);
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
static void multiply_rows(const uint32_t* const* x, const uint32_t* panel, int64_t num_words, float* c, const float* kept, int columns, const char* ahead) {
  constexpr int V = R == 1 ? kVectorsAlone : kVectors;
  if constexpr (V == 4 && Lines == 0) {  // most of a narrow panel would be zeros
    if (columns <= 2 * kLanes) return multiply<N, R, 2, 0>(x, panel, num_words, c, kept, nullptr);
    if (columns <= 3 * kLanes) return multiply<N, R, 3, 0>(x, panel, num_words, c, kept, nullptr);
  }
  for (int j = 0; j < columns; j += V * kLanes) {
    if (j == 0)
      multiply<N, R, V, Lines>(x, panel, num_words, c, kept, ahead);
    else
      multiply<N, R, V, 0>(x, panel + j, num_words, c + j, kept, ahead);
  }
}

template <typename N, int Lines>
INLINE void multiply_some(int num_rows, const uint32_t* const* x, const uint32_t* panel, int64_t num_words, float* c, const float* kept, int columns, const char* ahead) {
  switch (num_rows) {
    case 1: return multiply_rows<N, 1, Lines>(x, panel, num_words, c, kept, columns, ahead);
    case 2: return multiply_rows<N, 2, Lines>(x, panel, num_words, c, kept, columns, ahead);
    case 3: return multiply_rows<N, 3, Lines>(x, panel, num_words, c, kept, columns, ahead);
    case 4: return multiply_rows<N, 4, Lines>(x, panel, num_words, c, kept, columns, ahead);
#if defined(__AVX512F__)
    case 5: return multiply_rows<N, 5, Lines>(x, panel, num_words, c, kept, columns, ahead);
    case 6: return multiply_rows<N, 6, Lines>(x, panel, num_words, c, kept, columns, ahead);
#endif
  }
}

// Rows in groups of nearly equal size: 8 are 4 + 4, not 6 + 2.
INLINE int next_group(int64_t rows_left) {
  int64_t groups = (rows_left + kMaxRows - 1) / kMaxRows;
  return (int)((rows_left + groups - 1) / groups);
}

// c [num_rows][64] = x . panel (+ c), all rows.
template <typename N>
static void multiply_all(const uint32_t* const* x, int64_t num_rows, const uint32_t* panel, int64_t num_words, float* c, bool add) {
  for (int64_t r = 0; r < num_rows;) {
    int group = next_group(num_rows - r);
    multiply_some<N, 0>(group, x + r, panel, num_words, c + r * kPanel, add ? kAll : nullptr, kPanel, nullptr);
    r += group;
  }
}

template <typename N>
static void pack_panel(uint32_t* panel, const void* const* rows, int64_t num_in) {
  int64_t whole = num_in / N::kPerWord, tile_end = whole / kLanes * kLanes, num_words = (num_in + N::kPerWord - 1) / N::kPerWord;
  for (int first = 0; first < kPanel; first += kLanes) {
    for (int64_t k = 0; k < tile_end; k += kLanes) {
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
  for (int64_t row = first_row; row < first_row + num_rows; ++row, c += kPanel) {
    float* y = t.y + (t.y_rows ? t.y_rows[row] : row) * t.y_stride + first;
    const Floats weight = splat(t.y_weights ? t.y_weights[row] : 1.0f);
    for (int j = 0; j < kPanel && j < left; j += kLanes) {
      int64_t n = left - j;
      Floats v = load(c + j);
      if (bias) v = v + load(bias + j);
      v = v * weight;
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
    // follow each other in memory. A single group is as fast as the processor's own fetching.
    const int64_t groups = (num_rows + kMaxRows - 1) / kMaxRows, left = w.num_out - panel * kPanel;
    const int columns = t.after == After::kSiluMul || left > kPanel ? kPanel : (int)left;
    const char* ahead = (const char*)(words + num_words * kPanel);
    int lines_left = groups == 1 || columns < kPanel ? 0 : 4;
    for (int64_t r = 0; r < num_rows;) {
      const int group = next_group(num_rows - r);
      const uint32_t* x[kMaxRows];
      for (int i = 0; i < group; ++i) x[i] = t.x + (t.x_rows ? t.x_rows[first_row + r + i] : first_row + r + i) * t.x_stride + k;
      float* c = scratch + r * kPanel;
      const float* kept = k ? kAll : nullptr;
      const int lines = lines_left == 0 ? 0 : groups > 3 ? 1 : 2;
      if (lines == 0)
        multiply_some<N, 0>(group, x, words, num_words, c, kept, columns, nullptr);
      else if (lines == 1)
        multiply_some<N, 1>(group, x, words, num_words, c, kept, columns, ahead);
      else
        multiply_some<N, 2>(group, x, words, num_words, c, kept, columns, ahead);
      lines_left -= lines, ahead += num_words * lines * 64;
      if (is_last) finish_rows<N>(t, panel, first_row + r, group, c);
      r += group;
    }
  }
}

}  // namespace
