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
  void next_head(int64_t head_stride) {
    for (const Stored*& run : keys) run = run ? run + head_stride : nullptr;
  }
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

// The first tile of the piece that comes next, or `last`.
template <typename N>
INLINE Tile<N> first_of_next(const AttentionTask& t, const AttentionPiece& piece, const Tile<N>& last) {
  return piece.next ? find_tile<N>(t, *piece.next, piece.next_head, first_tile(t, *piece.next)) : last;
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
  constexpr bool kIsRough = sizeof(typename N::Stored) == 2;
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
  store(tops, -top), store(factors, power_of_two<kIsRough>(before - top)), store_part(highest, top, num_rows);
  for (int r = 0; r < num_rows; ++r) {
    const float* row = scores + r * kPanel;
    const Floats lowered = splat(tops[r]), factor = splat(factors[r]);
    Sixteen sum = sums[r];
    for (Floats& part : sum.part) part = part * factor;
#pragma GCC unroll 4
    for (int i = 0; i < kKeyTile; i += kLanes) {
      const Floats score = load(row + i);
      Floats weight = power_of_two<kIsRough>(fma(score, splat(scale), lowered));
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

// Where one thread works, in its scratch: for one head of many rows, or for several heads of few.
template <typename N>
struct Desk {
  uint32_t* keys;              // [dim words][64]
  uint32_t* values;            // [dim panels][key words][64]
  float* scores;               // [rows of a batch][64]
  typename N::Stored* weights; // [rows of a batch][64]
  float* out;                  // [head][dim panels][rows][64]
  const uint32_t* q[kTileRows];
  const uint32_t* w[kBatchRows];  // rows of weights
  float highest[kTileRows], kept[kBatchRows];
  Sixteen sums[kTileRows];
};

template <typename N>
INLINE void set_up(Desk<N>& desk, const AttentionTask& t, const AttentionItem& item, int first_head, int num_heads, float* scratch) {
  typedef typename N::Stored Stored;
  const int heads = t.num_heads / t.num_kv_heads, rows = item.num_tokens * heads, dim = t.head_dim, dim_panels = (dim + kPanel - 1) / kPanel;
  desk.keys = (uint32_t*)scratch, desk.values = desk.keys + dim * kPanel;
  desk.scores = (float*)(desk.values + dim_panels * kPanel * kPanel);
  desk.weights = (Stored*)(desk.scores + kBatchRowsMost * kPanel);
  desk.out = (float*)desk.weights + kBatchRowsMost * kPanel;
  for (int r = 0; r < kBatchRows; ++r) desk.w[r] = (const uint32_t*)(desk.weights + r * kKeyTile);
  for (int h = 0; h < num_heads; ++h)
    for (int r = 0; r < rows; ++r) {
      const Stored* row = (const Stored*)(t.q + (item.first_row + r / heads) * t.q_stride);
      desk.q[h * rows + r] = (const uint32_t*)(row + ((first_head + h) * heads + r % heads) * dim);
      desk.highest[h * rows + r] = -1e30f, desk.sums[h * rows + r] = Sixteen{};
    }
  memset(desk.out, 0, sizeof(float) * dim_panels * num_heads * rows * kPanel);
}

template <typename N>
INLINE void write_out(const Desk<N>& desk, const AttentionTask& t, const AttentionItem& item, int first_head, int num_heads) {
  typedef typename N::Stored Stored;
  const int heads = t.num_heads / t.num_kv_heads, rows = item.num_tokens * heads, dim = t.head_dim, dim_panels = (dim + kPanel - 1) / kPanel;
  for (int i = 0; i < num_heads * rows; ++i) {
    const int h = i / rows, r = i % rows;
    const Floats scale_out = splat(1.0f / total(desk.sums[i]));
    Stored* y = (Stored*)(t.out + (item.first_row + r / heads) * t.out_stride) + ((first_head + h) * heads + r % heads) * dim;
    for (int d = 0; d < dim; d += 2 * kLanes) {
      const float* from = desk.out + ((h * dim_panels + d / kPanel) * rows + r) * kPanel + d % kPanel;
      Floats low = load(from) * scale_out, high = load(from + kLanes) * scale_out;
      N::restore_pair(dim - d, &low, &high);
      for (int j = 0; j < 2; ++j, low = high) {
        const int at = d + j * kLanes, n = dim - at;
        if (n >= kLanes)
          N::write(y + at, low);
        else if (n > 0)
          N::write_part(y + at, low, n);
      }
    }
  }
}

// What the token at `position` sees of the tile that begins with key `first`.
INLINE Seen seen_of(const AttentionTask& t, int64_t position, int64_t first, int tile_end) {
  const int64_t at = position - first, oldest = t.window ? at - t.window + 1 : 0;
  return {(int)(oldest < 0 ? 0 : oldest > kKeyTile ? kKeyTile : oldest), (int)(at < 0 ? 0 : at < tile_end ? at + 1 : tile_end)};
}

// Rows of a head as few as a register tile holds read keys and values as they lie. Heads lie side by side in a block: they are passed over
// for each tile, so that memory is read in long runs, and the maxima and weights of several are computed together.
template <typename N>
static void attend_few(Desk<N>& desk, const AttentionTask& t, const AttentionPiece& piece) {
  const AttentionItem& item = *piece.item;
  const int first_head = piece.first_head, num_heads = piece.num_heads;
  const int heads = t.num_heads / t.num_kv_heads, rows = item.num_tokens * heads, dim_panels = (t.head_dim + kPanel - 1) / kPanel;
  const int64_t context = item.start + item.num_tokens, head_stride = t.block_size * t.head_dim;
  const int together = kBatchRows / rows;
  for (int64_t first = first_tile(t, item); first < context; first += kKeyTile) {
    Tile<N> tile = find_tile<N>(t, item, first_head, first);
    look_ahead<N>(tile, first + kKeyTile < context ? find_tile<N>(t, item, first_head, first + kKeyTile) : first_of_next<N>(t, piece, tile));
    Seen seen[kBatchRows];
    bool is_whole = true;
    for (int i = 0; i < together * rows; ++i) {
      seen[i] = seen_of(t, item.start + i % rows / heads, first, tile.end);
      is_whole &= seen[i].begin == 0 && seen[i].end == kKeyTile;
    }
    for (int h = 0; h < num_heads; h += together) {
      const int count = num_heads - h < together ? num_heads - h : together;
      Tile<N> of_head = tile;
      for (int i = 0; i < count; ++i, of_head.next_head(head_stride)) score_few<N>(rows, of_head, desk.q + (h + i) * rows, desk.scores + i * rows * kPanel);
      (is_whole ? weigh<N, true> : weigh<N, false>)(count * rows, seen, desk.scores, desk.weights, t.scale * kLog2e, desk.highest + h * rows, desk.sums + h * rows, desk.kept);
      for (int i = 0; i < count; ++i, tile.next_head(head_stride))
        add_few<N>(rows, tile, desk.w + i * rows, desk.kept + i * rows, desk.out + (h + i) * dim_panels * rows * kPanel);
    }
  }
}

// More rows than that: a tile is packed first. A batch of rows goes all the way from scores to sums while they are in the first-level cache.
template <typename N>
static void attend_many(Desk<N>& desk, const AttentionTask& t, const AttentionPiece& piece, int head) {
  const AttentionItem& item = *piece.item;
  const int heads = t.num_heads / t.num_kv_heads, rows = item.num_tokens * heads, dim = t.head_dim;
  const int dim_words = dim / N::kPerWord, dim_panels = (dim + kPanel - 1) / kPanel, value_words = kKeyTile / N::kPerWord * kPanel;
  const int64_t context = item.start + item.num_tokens;
  for (int64_t first = first_tile(t, item); first < context; first += kKeyTile) {
    Tile<N> tile = find_tile<N>(t, item, head, first);
    look_ahead<N>(tile, first + kKeyTile < context ? find_tile<N>(t, item, head, first + kKeyTile) : first_of_next<N>(t, piece, tile));
    pack_keys<N>(desk.keys, tile), pack_values<N>(desk.values, tile);
    for (int r = 0, batch; r < rows; r += batch) {
      batch = next_batch(rows - r);
      Seen seen[kBatchRows];
      int end = 0, begin = kKeyTile;
      bool is_whole = true;
      for (int i = 0; i < batch; ++i) {
        seen[i] = seen_of(t, item.start + (r + i) / heads, first, tile.end);
        end = seen[i].end > end ? seen[i].end : end, begin = seen[i].begin < begin ? seen[i].begin : begin;
        is_whole &= seen[i].begin == 0 && seen[i].end == kKeyTile;
      }
      if (begin >= end) continue;
      for (int i = 0, group; i < batch; i += group) {
        group = next_group(batch - i);
        multiply_some<N, 0>(group, desk.q + r + i, desk.keys, dim_words, desk.scores + i * kPanel, nullptr, end, nullptr);
      }
      (is_whole ? weigh<N, true> : weigh<N, false>)(batch, seen, desk.scores, desk.weights, t.scale * kLog2e, desk.highest + r, desk.sums + r, desk.kept);
      for (int i = 0, group; i < batch; i += group) {
        group = next_group(batch - i);
        for (int p = 0; p < dim_panels; ++p) {
          const int width = dim - p * kPanel < kPanel ? dim - p * kPanel : kPanel;
          float* c = desk.out + (p * rows + r + i) * kPanel;
          multiply_some<N, 0>(group, desk.w + i, desk.values + p * value_words, (end + N::kPerWord - 1) / N::kPerWord, c, desk.kept + i, width, nullptr);
        }
      }
    }
  }
}

// Some tokens of one sequence and `num_heads` KV heads, with the heads that read them.
template <typename N>
static void attention(const AttentionTask& t, const AttentionPiece& piece, float* scratch) {
  const AttentionItem& item = *piece.item;
  Desk<N> desk;
  if (item.num_tokens * (t.num_heads / t.num_kv_heads) <= kMaxRows) {
    set_up(desk, t, item, piece.first_head, piece.num_heads, scratch);
    attend_few(desk, t, piece);
    write_out(desk, t, item, piece.first_head, piece.num_heads);
    return;
  }
  for (int head = piece.first_head, end = head + piece.num_heads; head < end; ++head) {
    set_up(desk, t, item, head, 1, scratch);
    attend_many(desk, t, piece, head);
    write_out(desk, t, item, head, 1);
  }
}

}  // namespace
