// Memory of a network, weights packed in it, and a linear over them on all threads.
#pragma once
#include <stddef.h>

#include "tasks.h"
#include "threads.h"

namespace baton {

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

// What each thread may use for itself.
class Scratch {
 public:
  Scratch(int64_t floats, int num_threads) : floats_((floats + 1023) / 1024 * 1024), memory_(sizeof(float) * floats_ * num_threads) {}
  float* of(int thread) const { return memory_.as<float>() + thread * floats_; }

 private:
  int64_t floats_;
  Memory memory_;
};

struct PackedLinear : Linear {
  Memory memory, bias_memory;
};

// `parts` below each other; halves: the first half of the outputs is multiplied with the second (gate and up), 32 + 32 a panel.
void pack(PackedLinear* to, const Path& path, Threads& threads, int num_parts, const void* const* weights, const int64_t* rows,
          const float* const* biases, int64_t num_in, bool halves);
void run_linear(const Path& path, Threads& threads, const LinearTask& task, const Scratch& scratch);

}  // namespace baton
