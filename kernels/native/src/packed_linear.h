// Packed weights, the arena they lie in, and a linear over them on all threads.
#pragma once
#include <vector>

#include "memory.h"
#include "tasks.h"
#include "threads.h"

namespace baton {

// What each thread may use for itself.
class Scratch {
 public:
  Scratch(int64_t floats, int num_threads) : floats_((floats + 1023) / 1024 * 1024), memory_(sizeof(float) * floats_ * num_threads) {}
  float* of(int thread) const { return memory_.as<float>() + thread * floats_; }

 private:
  int64_t floats_;
  Memory memory_;
};

// One piece of memory for all packed weights of a network. What lies in it is taken before there is any, in an order that the shape
// alone decides, so that networks of one shape agree on every byte of it and one may read what another has packed.
class Arena {
 public:
  // The next `bytes`, in pages of their own; `*to` points to them as soon as there is memory. `to` stays where it is.
  template <typename T>
  void take(int64_t bytes, T** to) {
    pieces_.push_back({[](void* slot, char* at) { *static_cast<T**>(slot) = reinterpret_cast<T*>(at); }, to, bytes_});
    bytes_ += (bytes + kPage - 1) / kPage * kPage;
  }
  // Borrowed: bytes() of memory, zeroed or packed by a network of this shape.
  void put(void* base);
  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kPage = 4096;
  struct Piece {
    void (*point)(void* slot, char* at);
    void* slot;
    int64_t at;
  };
  std::vector<Piece> pieces_;
  int64_t bytes_ = 0;
};

struct PackedLinear : Linear {
  int64_t num_in = 0;
  bool halves = false;  // the first half of the outputs is multiplied with the second (gate and up), 32 + 32 a panel
};

void place(PackedLinear* linear, Arena& arena, const Path& path, int64_t num_out, int64_t num_in, bool halves = false, bool has_bias = false);
// `weights` below each other, into memory the arena was given.
void pack(const PackedLinear& to, const Path& path, Threads& threads, int num_parts, const void* const* weights, const int64_t* rows,
          const float* const* biases);
void run_linear(const Path& path, Threads& threads, const LinearTask& task, const Scratch& scratch);

}  // namespace baton
