// A decoder: packed weights, borrowed embedding and KV pool, and the forward pass over them.
#pragma once
#include <stddef.h>

#include <memory>
#include <vector>

#include "baton_native.h"
#include "tasks.h"
#include "threads.h"

namespace baton {

const Path& find_path(const char* name, bool is_bf16);  // throws std::runtime_error
const char* supported_paths();

// Zeroed memory in huge pages where the system gives them; `reserve` keeps nothing of the content.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { reserve(bytes); }
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  Memory& operator=(Memory&&) = delete;
  ~Memory();
  void reserve(size_t bytes);
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

struct PackedLinear : Linear {
  Memory memory, bias_memory;
};

// `parts` below each other; halves: the first half of the outputs is multiplied with the second (gate and up), 32 + 32 a panel.
void pack(PackedLinear* to, const Path& path, Threads& threads, int num_parts, const void* const* weights, const int64_t* rows,
          const float* const* biases, int64_t num_in, bool halves);
void run_linear(const Path& path, Threads& threads, const LinearTask& task, const Memory& scratch, size_t scratch_floats);

class Network {
 public:
  Network(const BatonShape& shape, const char* path);
  void set_linear(int layer, int which, int num_parts, const void* const* weights, const int64_t* rows, const float* const* biases);
  void set_norm(int layer, int which, const float* weight);
  void set_embedding(const void* table) { embedding_ = static_cast<const char*>(table); }
  void set_pool(void* blocks, int64_t num_blocks) { pool_ = static_cast<char*>(blocks), num_blocks_ = num_blocks; }
  void forward(const BatonStep& step);
  int64_t bytes() const;

 private:
  struct Layer {
    PackedLinear qkv, output, gate_up, down;
    std::vector<float> attention_norm, mlp_norm, q_norm, k_norm;
    int64_t window = 0;
  };
  void lay_out(const BatonStep& step);
  void embed(const BatonStep& step, int64_t num_rows);
  void run_layer(int index, int64_t num_rows);
  void finish(const BatonStep& step);
  void norm(const std::vector<float>& weight, const int64_t* rows, int64_t num_rows);
  void multiply(const PackedLinear& linear, const Memory& x, int64_t num_rows, After after, const Memory& y);
  // Work of a row or so is not worth another thread until there are some of them.
  template <typename Body>
  void each_row(int64_t num_rows, const Body& body);
  int64_t words(int64_t size) const { return path_.is_bf16 ? (size + 1) / 2 : size; }
  int64_t value_bytes() const { return path_.is_bf16 ? 2 : 4; }

  BatonShape shape_;
  const Path& path_;
  Threads threads_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_, frequencies_;
  PackedLinear head_;
  const char* embedding_ = nullptr;
  char* pool_ = nullptr;
  int64_t num_blocks_ = 0;
  int64_t qkv_size_, q_size_;
  // Of a step, by row: the residual stream, q k v, cosines and sines; then, in words, what linears read.
  Memory residual_, qkv_, cos_sin_, normed_, q_, attended_, gated_, scratch_;
  std::vector<int64_t> slots_, positions_, last_rows_;
  std::vector<AttentionItem> items_;
  size_t scratch_floats_;
};

}  // namespace baton
