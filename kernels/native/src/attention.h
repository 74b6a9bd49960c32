// Attention of some tokens of one sequence over its blocks, a tile of 64 keys at a time: softmax with a running maximum and sums
// (Milakov & Gimelshein, 2018). A score is one running sum over the dims and a result one over the keys, both in ascending order and in
// words (tasks.h), so a row's bits are the same whether it comes alone or among many.
#pragma once
#include <math.h>

#include "linear.h"

namespace {

using namespace baton;

constexpr int kRuns = kKeyTile / kRun;
constexpr int kBatchRows = 2 * kMaxRows < kLanes ? 2 * kMaxRows : kLanes;  // whose maxima and weights are computed together, a lane a row
static_assert(kBatchRows % kMaxRows == 0 && kBatchRows <= kBatchRowsMost, "a batch is whole groups and has its place in the scratch");
constexpr float kLog2e = 1.44269504088896341f;

// Keys and values of a tile, in runs that lie within one block.
template <typename N>
struct Tile {
  typedef typename N::Stored Stored;
  const Stored* keys[kRuns];  // null: no row sees any of the run, it may not be there
  int64_t ahead[kRuns];       // from a key to that in its place in the tile to come
  int64_t value_offset;       // from a key to its value
  int dim, begin, end;        // [begin, end) of the 64 may be read

  int num_words() const { return dim / N::kPerWord; }
  bool is_whole(int run) const { return begin <= run * kRun && end >= (run + 1) * kRun; }
  const Stored* value(int key) const {
    static const Stored zeros[kMaxHeadDim] = {};
    return key >= begin && key < end ? keys[key / kRun] + key % kRun * dim + value_offset : zeros;
  }
};

template <typename N>
INLINE Tile<N> find_tile(const AttentionTask& t, const AttentionItem& item, int kv_head, int64_t first) {
  typedef typename N::Stored Stored;
  const int64_t context = item.start + item.num_tokens, oldest = t.window && item.start >= t.window ? item.start - t.window + 1 : 0;
  const int64_t head_stride = t.block_size * t.head_dim;
  Tile<N> tile;
  tile.value_offset = t.num_kv_heads * head_stride, tile.dim = t.head_dim;
  tile.begin = first < oldest ? (int)(oldest - first) : 0;
  tile.end = context - first < kKeyTile ? (int)(context - first) : kKeyTile;
  for (int i = 0; i < kRuns; ++i) {
    const int64_t position = first + i * kRun;
    const bool is_seen = i * kRun < tile.end && (i + 1) * kRun > tile.begin;
    tile.keys[i] = is_seen ? (const Stored*)(t.kv + (int64_t)item.table[position / t.block_size] * t.block_bytes) + kv_head * head_stride + position % t.block_size * t.head_dim
                           : nullptr;
  }
  return tile;
}

INLINE int64_t first_tile(const AttentionTask& t, const AttentionItem& item) {
  return t.window && item.start >= t.window ? (item.start - t.window + 1) / kKeyTile * kKeyTile : 0;
}

// Runs are so short that the processor does not see the next one coming: whoever reads a key or a value asks for that in its place in
// the tile to come. A tile with fewer of them asks for the rest at once.
template <typename N>
INLINE void look_ahead(Tile<N>& tile, const Tile<N>& next) {
  for (int i = 0; i < kRuns; ++i) {
    tile.ahead[i] = tile.keys[i] && next.keys[i] ? next.keys[i] - tile.keys[i] : 0;
    if (next.keys[i] && !tile.is_whole(i))
      for (int64_t at = 0; at < kRun * tile.dim; at += 64 / (int64_t)sizeof(*next.keys[i])) prefetch(next.keys[i] + at), prefetch(next.keys[i] + tile.value_offset + at);
  }
}

// Words [k, k + kLanes) of kLanes neighbouring keys, a lane a key.
template <typename N>
INLINE void load_keys(const Tile<N>& tile, int first, int k, Words* lanes) {
  const int64_t ahead = tile.ahead[first / kRun];
  const auto* key = tile.keys[first / kRun] + (first % kRun * tile.dim + k * N::kPerWord);
  for (int i = 0; i < kLanes; ++i, key += tile.dim) {
    prefetch(key + ahead);
    lanes[i] = load_up_to<Words>((const uint32_t*)key, tile.num_words() - k);
  }
  transpose(lanes);
}

// scores[row][key] = q[row] . key for R rows, keys as they lie.
template <typename N, int R>
static void score_keys(const Tile<N>& tile, const uint32_t* const* q, float* scores) {
  for (int i = 0; i < kKeyTile; i += kLanes) {
    if (!tile.keys[i / kRun]) continue;
    Floats sum[R] = {};
    for (int k = 0; k < tile.num_words(); k += kLanes) {
      Words lanes[kLanes];
      load_keys<N>(tile, i, k, lanes);
#pragma GCC unroll 16
      for (int w = 0; w < kLanes; ++w) {
        if (k + w >= tile.num_words()) break;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) sum[r] = N::multiply_add(N::broadcast(q[r][k + w]), N::factor(lanes[w]), sum[r]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) store(scores + r * kPanel + i, sum[r]);
  }
}

// sum[row][dim] += weight[row] . values of one key word, dims from d on.
template <typename N, int R>
INLINE void add_word(const typename N::Stored* even, const typename N::Stored* odd, int d, int dim, const uint32_t* const* weights, int word, Floats (*sum)[kVectors]) {
  Words b[kVectors];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; v += 2) N::pair(even, odd, d + v * kLanes, dim - d - v * kLanes, &b[v], &b[v + 1]);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const typename N::Factor a = N::broadcast(weights[r][word]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = N::multiply_add(a, N::factor(b[v]), sum[r][v]);
  }
}

// out[row][dim] = kept[row] * out[row][dim] + weights[row] . values for R rows, values as they lie; dims in the order of N::pair.
template <typename N, int R>
static void add_values(const Tile<N>& tile, const uint32_t* const* weights, const float* kept, float* out) {
  constexpr int kWords = kRun / N::kPerWord;
  for (int d = 0; d < tile.dim; d += kVectors * kLanes) {
    float* c = out + d / kPanel * R * kPanel + d % kPanel;
    Floats sum[R][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load(c + r * kPanel + v * kLanes) * splat(kept[r]);
    for (int run = 0; run < kRuns; ++run) {
      if (tile.is_whole(run)) {
        const auto* value = tile.keys[run] + tile.value_offset;
        for (int i = 0; i < kWords; ++i, value += N::kPerWord * tile.dim) {
          const auto* ahead = value + tile.ahead[run] + d;
          prefetch(ahead), prefetch(ahead + tile.dim / 2);
          if (N::kPerWord == 2) prefetch(ahead + tile.dim), prefetch(ahead + tile.dim + tile.dim / 2);
          add_word<N, R>(value, value + (N::kPerWord - 1) * tile.dim, d, tile.dim, weights, run * kWords + i, sum);
        }
      } else if (tile.keys[run]) {
        for (int i = run * kWords; i < (run + 1) * kWords; ++i)
          add_word<N, R>(tile.value(i * N::kPerWord), tile.value(i * N::kPerWord + N::kPerWord - 1), d, tile.dim, weights, i, sum);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(c + r * kPanel + v * kLanes, sum[r][v]);
  }
}

// Keys as a panel [dim word][64].
template <typename N>
INLINE void pack_keys(uint32_t* panel, const Tile<N>& tile) {
  for (int i = 0; i < kKeyTile; i += kLanes) {
    if (!tile.keys[i / kRun]) continue;
    for (int k = 0; k < tile.num_words(); k += kLanes) {
      Words lanes[kLanes];
      load_keys<N>(tile, i, k, lanes);
      for (int w = 0; w < kLanes && k + w < tile.num_words(); ++w) store(panel + (k + w) * kPanel + i, lanes[w]);
    }
  }
}

// Values as panels [dim / 64][key word][64], dims in the order of N::pair.
template <typename N>
INLINE void pack_values(uint32_t* panels, const Tile<N>& tile) {
  for (int word = 0; word * N::kPerWord < tile.end; ++word) {
    const auto *even = tile.value(word * N::kPerWord), *odd = tile.value(word * N::kPerWord + N::kPerWord - 1);
    const int run = word * N::kPerWord / kRun;
    const int64_t ahead = tile.is_whole(run) ? tile.ahead[run] : 0;
    for (int d = 0; d < tile.dim; d += 2 * kLanes) {
      prefetch(even + d + ahead), prefetch(odd + d + ahead);
      uint32_t* to = panels + ((d / kPanel) * (kKeyTile / N::kPerWord) + word) * kPanel + d % kPanel;
      Words low, high;
      N::pair(even, odd, d, tile.dim - d, &low, &high);
      store(to, low), store(to + kLanes, high);
    }
  }
}

struct Seen {  // keys [begin, end) of a tile, by one row
  int begin, end;
};

// Scores of some rows to weights 2^(scale * score - top), as words; maxima, sums and what earlier results are multiplied with go along.
// IsWhole: every row sees every key.
template <typename N, bool IsWhole>
static void weigh(int num_rows, const Seen* seen, float* scores, typename N::Stored* weights, float scale, float* highest, Sixteen* sums, float* kept) {
  float most[kLanes];
  store(most, splat(-INFINITY));
  for (int r = 0; r < num_rows; ++r) {
    float* row = scores + r * kPanel;
    if (!IsWhole)
      for (int i = 0; i < kKeyTile; ++i) row[i] = i >= seen[r].begin && i < seen[r].end ? row[i] : -INFINITY;
    Floats top = load(row);
    for (int i = kLanes; i < kKeyTile; i += kLanes) top = maximum(top, load(row + i));
    most[r] = greatest(top);
  }
  const Floats before = load_part<Floats>(highest, num_rows), top = maximum(load(most) * splat(scale), before);
  float tops[kLanes], factors[kLanes];
  store(tops, -top), store(factors, power_of_two(before - top)), store_part(highest, top, num_rows);
  for (int r = 0; r < num_rows; ++r) {
    const float* row = scores + r * kPanel;
    const Floats lowered = splat(tops[r]), factor = splat(factors[r]);
    Sixteen sum = sums[r];
    for (Floats& part : sum.part) part = part * factor;
#pragma GCC unroll 4
    for (int i = 0; i < kKeyTile; i += kLanes) {
      const Floats score = load(row + i);
      Floats weight = power_of_two(fma(score, splat(scale), lowered));
      if (!IsWhole) weight = score == splat(-INFINITY) ? splat(0.0f) : weight;
      sum.part[i % 16 / kLanes] = sum.part[i % 16 / kLanes] + weight;
      N::write(weights + r * kKeyTile + i, weight);
    }
    kept[r] = factors[r], sums[r] = sum;
  }
}

// One group alone, or two: while the maximum of one row is awaited others are computed.
INLINE int next_batch(int64_t rows_left) {
  const int group = next_group(rows_left);
  return rows_left > group && group + next_group(rows_left - group) <= kBatchRows ? group + next_group(rows_left - group) : group;
}

template <typename N>
INLINE void score_few(int num_rows, const Tile<N>& tile, const uint32_t* const* q, float* scores) {
  switch (num_rows) {
    case 1: return score_keys<N, 1>(tile, q, scores);
    case 2: return score_keys<N, 2>(tile, q, scores);
    case 3: return score_keys<N, 3>(tile, q, scores);
    case 4: return score_keys<N, 4>(tile, q, scores);
#if defined(__AVX512F__)
    case 5: return score_keys<N, 5>(tile, q, scores);
    case 6: return score_keys<N, 6>(tile, q, scores);
#endif
  }
}

template <typename N>
INLINE void add_few(int num_rows, const Tile<N>& tile, const uint32_t* const* weights, const float* kept, float* out) {
  switch (num_rows) {
    case 1: return add_values<N, 1>(tile, weights, kept, out);
    case 2: return add_values<N, 2>(tile, weights, kept, out);
    case 3: return add_values<N, 3>(tile, weights, kept, out);
    case 4: return add_values<N, 4>(tile, weights, kept, out);
#if defined(__AVX512F__)
    case 5: return add_values<N, 5>(tile, weights, kept, out);
    case 6: return add_values<N, 6>(tile, weights, kept, out);
#endif
  }
}

// Some tokens of one sequence and the heads of one group. Rows as few as a register tile holds read keys and values as they lie; for more
// of them a tile is packed first. A group of rows goes all the way from scores to sums while they are in the first-level cache.
template <typename N>
static void attention(const AttentionTask& t, int64_t index, int kv_head, float* scratch) {
  typedef typename N::Stored Stored;
  const AttentionItem& item = t.items[index];
  const int heads = t.num_heads / t.num_kv_heads, num_rows = item.num_tokens * heads, dim = t.head_dim;
  const int dim_words = dim / N::kPerWord, dim_panels = (dim + kPanel - 1) / kPanel, value_words = kKeyTile / N::kPerWord * kPanel;
  uint32_t* keys = (uint32_t*)scratch;                              // [dim words][64]
  uint32_t* values = keys + dim * kPanel;                           // [dim panels][key words][64]
  float* scores = (float*)(values + dim_panels * kPanel * kPanel);  // [rows of a batch][64]
  Stored* weights = (Stored*)(scores + kBatchRowsMost * kPanel);    // [rows of a batch][64]
  float* out = (float*)weights + kBatchRowsMost * kPanel;           // [dim panels][rows][64]
  float highest[kTileRows], kept[kBatchRows];
  Sixteen sums[kTileRows];
  const uint32_t *q[kTileRows], *w[kBatchRows];
  for (int r = 0; r < kBatchRows; ++r) w[r] = (const uint32_t*)(weights + r * kKeyTile);
  for (int r = 0; r < num_rows; ++r) {
    const Stored* row = (const Stored*)(t.q + (item.first_row + r / heads) * t.q_stride);
    q[r] = (const uint32_t*)(row + (kv_head * heads + r % heads) * dim);
    highest[r] = -1e30f;
    sums[r] = Sixteen{};
  }
  memset(out, 0, sizeof(float) * dim_panels * num_rows * kPanel);
  const bool is_few = num_rows <= kMaxRows;
  const int64_t context = item.start + item.num_tokens;
  const float scale = t.scale * kLog2e;
  for (int64_t first = first_tile(t, item); first < context; first += kKeyTile) {
    Tile<N> tile = find_tile<N>(t, item, kv_head, first);
    if (first + kKeyTile < context)
      look_ahead<N>(tile, find_tile<N>(t, item, kv_head, first + kKeyTile));
    else if (kv_head + 1 < t.num_kv_heads)  // the piece this thread most likely computes next
      look_ahead<N>(tile, find_tile<N>(t, item, kv_head + 1, first_tile(t, item)));
    else if (index + 1 < t.num_items)
      look_ahead<N>(tile, find_tile<N>(t, t.items[index + 1], 0, first_tile(t, t.items[index + 1])));
    else
      look_ahead<N>(tile, tile);
    if (!is_few) pack_keys<N>(keys, tile), pack_values<N>(values, tile);
    int token = 0, head = 0;
    for (int r = 0; r < num_rows;) {
      const int batch = next_batch(num_rows - r);
      Seen seen[kBatchRows];
      int end = 0, begin = kKeyTile;
      bool is_whole = true;
      for (int i = 0; i < batch; ++i) {
        const int64_t position = item.start + token - first, oldest = t.window ? position - t.window + 1 : 0;
        seen[i].begin = (int)(oldest < 0 ? 0 : oldest > kKeyTile ? kKeyTile : oldest);
        seen[i].end = (int)(position < 0 ? 0 : position < tile.end ? position + 1 : tile.end);
        end = seen[i].end > end ? seen[i].end : end, begin = seen[i].begin < begin ? seen[i].begin : begin;
        is_whole &= seen[i].begin == 0 && seen[i].end == kKeyTile;
        if (++head == heads) head = 0, ++token;
      }
      if (begin < end) {
        for (int i = 0, group; i < batch; i += group) {
          group = next_group(batch - i);
          if (is_few)
            score_few<N>(group, tile, q + r + i, scores + i * kPanel);
          else
            multiply_some<N, 0>(group, q + r + i, keys, dim_words, scores + i * kPanel, nullptr, end, nullptr);
        }
        (is_whole ? weigh<N, true> : weigh<N, false>)(batch, seen, scores, weights, scale, highest + r, sums + r, kept);
        for (int i = 0, group; i < batch; i += group) {
          group = next_group(batch - i);
          if (is_few) add_few<N>(group, tile, w + i, kept + i, out);
          for (int p = 0; p < dim_panels && !is_few; ++p) {
            const int width = dim - p * kPanel < kPanel ? dim - p * kPanel : kPanel;
            float* c = out + (p * num_rows + r + i) * kPanel;
            multiply_some<N, 0>(group, w + i, values + p * value_words, (end + N::kPerWord - 1) / N::kPerWord, c, kept + i, width, nullptr);
          }
        }
      }
      r += batch;
    }
  }
  for (int r = 0; r < num_rows; ++r) {
    const Floats scale_out = splat(1.0f / total(sums[r]));
    Stored* y = (Stored*)(t.out + (item.first_row + r / heads) * t.out_stride) + (kv_head * heads + r % heads) * dim;
    for (int d = 0; d < dim; d += 2 * kLanes) {
      const float* from = out + (d / kPanel * num_rows + r) * kPanel + d % kPanel;
      Floats low = load(from) * scale_out, high = load(from + kLanes) * scale_out;
      N::restore_pair(dim - d, &low, &high);
      for (int i = 0; i < 2; ++i, low = high) {
        const int at = d + i * kLanes, n = dim - at;
        if (n >= kLanes)
          N::write(y + at, low);
        else if (n > 0)
          N::write_part(y + at, low, n);
      }
    }
  }
}

}  // namespace
