#include "network.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace baton {

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

}  // namespace

Network::Network(const BatonShape& shape, const char* path)
    : shape_(shape), path_(find_path(path, shape.is_bf16)), threads_(shape.num_threads), layers_(shape.num_layers),
      scratch_(scratch_floats(shape.head_dim), shape.num_threads) {
  require(shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= kMaxHeadDim, "head_dim must be even and at most 512");
  require(shape.num_heads % shape.num_kv_heads == 0, "heads must be a multiple of KV heads");
  require(shape.num_heads / shape.num_kv_heads <= kTileRows, "at most 192 heads share one KV head");
  require(shape.block_size > 0 && shape.block_size % kRun == 0, "block_size must be a multiple of 16");
  for (int i = 0; i < shape.num_layers; ++i) layers_[i].window = shape.windows[i];
  frequencies_.assign(shape.frequencies, shape.frequencies + shape.head_dim / 2);
  q_size_ = int64_t{shape.num_heads} * shape.head_dim;
  qkv_size_ = q_size_ + int64_t{2} * shape.num_kv_heads * shape.head_dim;
  if (shape.num_experts)
    mixture_.reset(new Mixture({shape.hidden_size, shape.num_experts, shape.num_experts_chosen, shape.expert_intermediate_size, shape.normalize_experts != 0}, path_, threads_));
  place_weights();
}

void Network::place_weights() {
  const int64_t hidden = shape_.hidden_size, inner = shape_.intermediate_size;
  for (int i = 0; i < shape_.num_layers; ++i) {
    Layer& layer = layers_[i];
    place(&layer.qkv, arena_, path_, qkv_size_, hidden, false, shape_.has_qkv_bias);
    place(&layer.output, arena_, path_, hidden, q_size_, false, shape_.has_output_bias);
    if (mixture_ && shape_.has_experts[i]) {
      mixture_->place(&layer.experts, arena_);
    } else {
      place(&layer.gate_up, arena_, path_, 2 * inner, hidden, true, shape_.has_mlp_bias);
      place(&layer.down, arena_, path_, hidden, inner, false, shape_.has_mlp_bias);
    }
  }
  place(&head_, arena_, path_, shape_.vocab_size, hidden);
  if (shape_.has_embedding) arena_.take(int64_t{shape_.vocab_size} * hidden * value_bytes(), &embedding_);
  shape_.has_experts = nullptr, shape_.windows = nullptr, shape_.frequencies = nullptr;  // the caller's
}

void Network::set_embedding(char* table) {
  if (shape_.has_embedding)
    memcpy(embedding_, table, int64_t{shape_.vocab_size} * shape_.hidden_size * value_bytes());
  else
    embedding_ = table;
}

void Network::set_linear(int layer, int which, int num_parts, const void* const* weights, const int64_t* rows, const float* const* biases) {
  require(which == BATON_HEAD || (layer >= 0 && layer < shape_.num_layers), "no such layer");
  const PackedLinear* to = &head_;
  switch (which) {
    case BATON_QKV: to = &layers_[layer].qkv; break;
    case BATON_OUTPUT: to = &layers_[layer].output; break;
    case BATON_GATE_UP: to = &layers_[layer].gate_up; break;
    case BATON_DOWN: to = &layers_[layer].down; break;
    case BATON_HEAD: break;
    case BATON_ROUTER: to = &layers_[layer].experts.router; break;
    default: require(false, "no such linear");
  }
  pack(*to, path_, threads_, num_parts, weights, rows, biases);
}

void Network::set_experts(int layer, const void* const* gate, const void* const* up, const void* const* down) {
  require(layer >= 0 && layer < shape_.num_layers && layers_[layer].experts.gate_up, "no such layer with experts, or no arena yet");
  mixture_->pack(layers_[layer].experts, gate, up, down);
}

void Network::set_norm(int layer, int which, const float* weight) {
  require(which == BATON_FINAL_NORM || (layer >= 0 && layer < shape_.num_layers), "no such layer");
  std::vector<float>* to = &final_norm_;
  int64_t size = shape_.hidden_size;
  switch (which) {
    case BATON_ATTENTION_NORM: to = &layers_[layer].attention_norm; break;
    case BATON_MLP_NORM: to = &layers_[layer].mlp_norm; break;
    case BATON_Q_NORM: to = &layers_[layer].q_norm, size = shape_.head_dim; break;
    case BATON_K_NORM: to = &layers_[layer].k_norm, size = shape_.head_dim; break;
    case BATON_FINAL_NORM: break;
    default: require(false, "no such norm");
  }
  to->assign(weight, weight + size);
}

// Rows of the step: where each token's KV goes, its angles; and the attention items.
void Network::lay_out(const BatonStep& step) {
  require(embedding_ && pool_ && head_.words, "a network needs an embedding, a pool and an arena");
  const int group_tokens = std::max(1, kTileRows / (shape_.num_heads / shape_.num_kv_heads));
  slots_.clear(), positions_.clear(), items_.clear(), told_rows_.clear(), told_items_.clear();
  told_of_entry_.assign(step.num_entries, -1);
  for (int64_t i = 0; i < step.num_logits; ++i) {
    require(step.logit_entries[i] >= 0 && step.logit_entries[i] < step.num_entries, "logits of an entry that is not there");
    told_of_entry_[step.logit_entries[i]] = 0;
  }
  int64_t first_block = 0;
  for (int64_t i = 0; i < step.num_entries; ++i) {
    const int64_t start = step.starts[i], end = start + step.sizes[i], num_blocks = step.table_ends[i] - first_block;
    const uint32_t* table = step.tables + first_block;
    require(step.sizes[i] > 0 && start >= 0 && end <= num_blocks * shape_.block_size, "an entry lies outside its blocks");
    for (int64_t block = 0; block < num_blocks; ++block) require(table[block] < num_blocks_, "a block lies outside the pool");
    const int64_t first_row = positions_.size();
    for (int64_t position = start; position < end; ++position) {
      positions_.push_back(position);
      slots_.push_back(table[position / shape_.block_size] * int64_t{shape_.block_size} + position % shape_.block_size);
    }
    for (int64_t at = start; at < end; at += group_tokens)
      items_.push_back({table, first_row + at - start, at, static_cast<int>(std::min<int64_t>(group_tokens, end - at))});
    if (told_of_entry_[i] == 0) {
      const int64_t row = first_row + end - start - 1;
      told_of_entry_[i] = told_rows_.size();
      told_rows_.push_back(row), told_items_.push_back({table, row, end - 1, 1});
    }
    first_block = step.table_ends[i];
  }
  cut(&items_, &pieces_), cut(&told_items_, &told_pieces_);
}

// Long contexts first, so that the last pieces to finish are short ones. Of few rows a head, heads stay together while every thread has two pieces.
void Network::cut(std::vector<AttentionItem>* items, std::vector<AttentionPiece>* pieces) const {
  std::stable_sort(items->begin(), items->end(), [](const AttentionItem& a, const AttentionItem& b) { return a.start + a.num_tokens > b.start + b.num_tokens; });
  const int kv_heads = shape_.num_kv_heads, heads = shape_.num_heads / kv_heads;
  const int64_t share = std::max<int64_t>(1, static_cast<int64_t>(items->size()) * kv_heads / (2 * threads_.size()));
  pieces->clear();
  for (const AttentionItem& item : *items) {
    const int rows = item.num_tokens * heads, together = rows > kFewRows ? 1 : static_cast<int>(std::min<int64_t>(share, kTileRows / rows));
    for (int head = 0; head < kv_heads; head += together) pieces->push_back({&item, head, std::min(together, kv_heads - head), nullptr, 0});
  }
  for (size_t i = 0; i + 1 < pieces->size(); ++i) (*pieces)[i].next = (*pieces)[i + 1].item, (*pieces)[i].next_head = (*pieces)[i + 1].first_head;
}

void Network::embed(const BatonStep& step, int64_t num_rows) {
  const int64_t hidden = shape_.hidden_size, half = shape_.head_dim / 2;
  residual_.reserve(sizeof(float) * num_rows * hidden);
  qkv_.reserve(sizeof(float) * num_rows * qkv_size_);
  cos_sin_.reserve(sizeof(float) * num_rows * shape_.head_dim);
  const int64_t input_rows = std::max(num_rows, step.num_logits);  // choices of one prompt may share a row
  normed_.reserve(4 * input_rows * words(hidden));
  q_.reserve(4 * num_rows * words(q_size_));
  attended_.reserve(4 * num_rows * words(q_size_));
  gated_.reserve(4 * num_rows * words(shape_.intermediate_size));
  for (int64_t row = 0; row < num_rows; ++row) require(step.token_ids[row] < static_cast<uint32_t>(shape_.vocab_size), "a token id lies outside the vocabulary");
  threads_.each_row(num_rows, [&](int, int64_t row) {
    path_.widen(residual_.as<float>() + row * hidden, embedding_ + step.token_ids[row] * hidden * value_bytes(), hidden);
    float* cosines = cos_sin_.as<float>() + row * shape_.head_dim;
    for (int64_t i = 0; i < half; ++i) {
      // The angle is rounded to float32 as in the checkpoints' own code; its cosine is then exact to the last bit.
      const double angle = static_cast<float>(positions_[row]) * frequencies_[i];
      cosines[i] = static_cast<float>(cos(angle)) * shape_.rotary_scale;
      cosines[half + i] = static_cast<float>(sin(angle)) * shape_.rotary_scale;
    }
  });
}

void Network::norm(const std::vector<float>& weight, const int64_t* rows, int64_t num_rows) {
  const NormTask task{residual_.as<float>(), shape_.hidden_size, rows, weight.data(), shape_.norm_eps, shape_.hidden_size,
                      normed_.as<uint32_t>(), words(shape_.hidden_size)};
  threads_.each_row(num_rows, [&](int, int64_t row) { path_.norm(task, row); });
}

void Network::multiply(const PackedLinear& linear, const Memory& x, int64_t num_rows, After after, const Memory& y, const int64_t* x_rows) {
  LinearTask task{};
  task.linear = &linear;
  task.x = x.as<uint32_t>(), task.x_stride = linear.num_words, task.x_rows = x_rows;
  task.num_rows = num_rows;
  task.after = after;
  if (after == After::kSiluMul)
    task.next = y.as<uint32_t>(), task.next_stride = words(linear.num_out / 2);
  else
    task.y = y.as<float>(), task.y_stride = linear.num_out;
  run_linear(path_, threads_, task, scratch_);
}

void Network::run_layer(const BatonStep& step, int index, int64_t num_rows) {
  const Layer& layer = layers_[index];
  const int64_t layer_bytes = int64_t{2} * shape_.num_kv_heads * shape_.block_size * shape_.head_dim * value_bytes();
  const int64_t block_bytes = layer_bytes * shape_.num_layers;
  norm(layer.attention_norm, nullptr, num_rows);
  multiply(layer.qkv, normed_, num_rows, After::kStore, qkv_);
  const RotaryTask rotary{qkv_.as<float>(), qkv_size_, layer.q_norm.empty() ? nullptr : layer.q_norm.data(),
                          layer.k_norm.empty() ? nullptr : layer.k_norm.data(), shape_.norm_eps, shape_.num_heads, shape_.num_kv_heads,
                          shape_.head_dim, cos_sin_.as<float>(), q_.as<uint32_t>(), words(q_size_), slots_.data(),
                          pool_ + index * layer_bytes, block_bytes, shape_.block_size};
  threads_.each_row(num_rows, [&](int, int64_t row) { path_.rotary(rotary, row); });
  if (step.clock) __atomic_store_n(step.clock, step.clock_begin + index + 1, __ATOMIC_RELEASE);
  // Beyond here the last layer is computed for the rows whose logits are told.
  const bool is_last = index == shape_.num_layers - 1;
  if (is_last && (num_rows = keep_told_rows(num_rows)) == 0) return;
  const std::vector<AttentionPiece>& pieces = is_last ? told_pieces_ : pieces_;
  const AttentionTask attention{q_.as<uint32_t>(), words(q_size_), pool_ + index * layer_bytes, block_bytes, shape_.block_size,
                                shape_.num_heads, shape_.num_kv_heads, shape_.head_dim, layer.window, 1.0f / sqrtf(static_cast<float>(shape_.head_dim)),
                                attended_.as<uint32_t>(), words(q_size_)};
  threads_.each(pieces.size(), [&](int thread, int64_t i) { path_.attention(attention, pieces[i], scratch_.of(thread)); });
  multiply(layer.output, attended_, num_rows, After::kAdd, residual_, is_last ? told_rows_.data() : nullptr);
  norm(layer.mlp_norm, nullptr, num_rows);
  if (layer.experts.router.words) return mixture_->add(layer.experts, normed_.as<uint32_t>(), num_rows, residual_.as<float>(), scratch_);
  multiply(layer.gate_up, normed_, num_rows, After::kSiluMul, gated_);
  multiply(layer.down, gated_, num_rows, After::kAdd, residual_);
}

// Their residual streams move to the front; returns how many they are.
int64_t Network::keep_told_rows(int64_t num_rows) {
  const int64_t hidden = shape_.hidden_size, num_told = told_rows_.size();
  float* residual = residual_.as<float>();
  if (num_told < num_rows)
    for (int64_t i = 0; i < num_told; ++i) memmove(residual + i * hidden, residual + told_rows_[i] * hidden, sizeof(float) * hidden);
  return num_told;
}

void Network::finish(const BatonStep& step) {
  std::vector<int64_t> rows(step.num_logits);
  for (int64_t i = 0; i < step.num_logits; ++i) rows[i] = told_of_entry_[step.logit_entries[i]];
  norm(final_norm_, rows.data(), step.num_logits);
  LinearTask task{};
  task.linear = &head_;
  task.x = normed_.as<uint32_t>(), task.x_stride = head_.num_words;
  task.num_rows = step.num_logits;
  task.after = After::kStore;
  task.y = step.logits, task.y_stride = shape_.vocab_size;
  run_linear(path_, threads_, task, scratch_);
  if (step.greedy)
    threads_.each(step.num_logits, [&](int, int64_t i) { step.greedy[i] = path_.greedy(step.logits + i * shape_.vocab_size, shape_.vocab_size); });
}

void Network::draw(const float* logits, int64_t num_draws, const BatonDraw* draws, int64_t* token_ids) {
  for (int64_t i = 0; i < num_draws; ++i) check_draw(draws[i], shape_.vocab_size);
  draw_scratch_.resize(threads_.size());
  threads_.each(num_draws, [&](int thread, int64_t i) {
    token_ids[i] = draw_token(path_, logits + draws[i].row * shape_.vocab_size, shape_.vocab_size, draws[i], &draw_scratch_[thread]);
  });
}

void Network::forward(const BatonStep& step) {
  lay_out(step);
  const int64_t num_rows = positions_.size();
  embed(step, num_rows);
  for (int layer = 0; layer < shape_.num_layers; ++layer) run_layer(step, layer, num_rows);
  if (step.num_logits) finish(step);
}

}  // namespace baton
