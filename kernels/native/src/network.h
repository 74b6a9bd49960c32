// A decoder: packed weights, borrowed embedding and KV pool, and the forward pass over them.
#pragma once
#include <memory>
#include <vector>

#include "baton_native.h"
#include "experts.h"
#include "packed_linear.h"
#include "sampling.h"
#include "tasks.h"
#include "threads.h"

namespace baton {

const Path& find_path(const char* name, bool is_bf16);  // throws std::runtime_error
const char* supported_paths();

class Network {
 public:
  Network(const BatonShape& shape, const char* path);
  int64_t arena_bytes() const { return arena_.bytes(); }
  void set_arena(void* base) { arena_.put(base); }
  void set_linear(int layer, int which, int num_parts, const void* const* weights, const int64_t* rows, const float* const* biases);
  void set_experts(int layer, const void* const* gate, const void* const* up, const void* const* down);
  void set_norm(int layer, int which, const float* weight);
  void set_embedding(char* table);
  void set_pool(void* blocks, int64_t num_blocks) { pool_ = static_cast<char*>(blocks), num_blocks_ = num_blocks; }
  void forward(const BatonStep& step);
  void draw(const float* logits, int64_t num_draws, const BatonDraw* draws, int64_t* token_ids);

 private:
  struct Layer {
    PackedLinear qkv, output, gate_up, down;
    PackedExperts experts;  // in place of gate_up and down where there are some
    std::vector<float> attention_norm, mlp_norm, q_norm, k_norm;
    int64_t window = 0;
  };
  void place_weights();
  void lay_out(const BatonStep& step);
  void embed(const BatonStep& step, int64_t num_rows);
  void cut(std::vector<AttentionItem>* items, std::vector<AttentionPiece>* pieces) const;
  void run_layer(const BatonStep& step, int index, int64_t num_rows);
  int64_t keep_told_rows(int64_t num_rows);
  void finish(const BatonStep& step);
  void norm(const std::vector<float>& weight, const int64_t* rows, int64_t num_rows);
  void multiply(const PackedLinear& linear, const Memory& x, int64_t num_rows, After after, const Memory& y, const int64_t* x_rows = nullptr);
  int64_t words(int64_t size) const { return path_.is_bf16 ? (size + 1) / 2 : size; }
  int64_t value_bytes() const { return path_.is_bf16 ? 2 : 4; }

  BatonShape shape_;
  const Path& path_;
  Threads threads_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_, frequencies_;
  PackedLinear head_;
  Arena arena_;
  std::unique_ptr<Mixture> mixture_;  // null: no layer has experts
  char* embedding_ = nullptr;
  char* pool_ = nullptr;
  int64_t num_blocks_ = 0;
  int64_t qkv_size_, q_size_;
  // Of a step, by row: the residual stream, q k v, cosines and sines; then, in words, what linears read.
  Memory residual_, qkv_, cos_sin_, normed_, q_, attended_, gated_;
  std::vector<int64_t> slots_, positions_;
  std::vector<AttentionItem> items_;
  // Of the last layer only keys and values are needed of every row; all else of the rows whose logits are told: one an entry that has some.
  std::vector<int64_t> told_rows_, told_of_entry_;  // ascending rows; entry: which of them, -1: none
  std::vector<AttentionItem> told_items_;
  std::vector<AttentionPiece> pieces_, told_pieces_;
  Scratch scratch_;
  std::vector<DrawScratch> draw_scratch_;  // of each thread
};

}  // namespace baton
