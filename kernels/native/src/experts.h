// A mixture of experts in place of the MLP: a router sends each row through a few of many gated MLPs, and the rows of one expert
// are multiplied together.
#pragma once
#include <stdint.h>

#include <vector>

#include "packed_linear.h"
#include "tasks.h"
#include "threads.h"

namespace baton {

struct PackedExperts {
  PackedLinear router;
  // [expert][panel][word][64]: neighbouring panels, which a thread computes one after the other, follow each other. `down` of a token's
  // two experts streams at 32 GB/s so, at 26 with the experts inside the panels (Zen 4, one core).
  uint32_t* gate_up = nullptr;  // a panel: 32 outputs of gate and 32 of up
  uint32_t* down = nullptr;
};

struct MixtureShape {
  int64_t hidden_size, num_experts, num_chosen, intermediate_size;
  bool normalize;  // the weights of a row's experts sum to one
};

// What the mixtures of a network have in common, and their memory of a step.
class Mixture {
 public:
  Mixture(const MixtureShape& shape, const Path& path, Threads& threads);

  void place(PackedExperts* experts, Arena& arena) const;
  // One pointer an expert: gate and up [intermediate_size][hidden_size], down [hidden_size][intermediate_size], in the path's dtype.
  void pack(const PackedExperts& to, const void* const* gate, const void* const* up, const void* const* down);

  // y [num_rows][hidden_size] += each row's experts of x (rows of words), by their weights and in ascending order of id, so that a
  // row's sum does not depend on who else chose them. Two threaded loops, and where there are many rows some for the choice.
  void add(const PackedExperts& experts, const uint32_t* x, int64_t num_rows, float* y, const Scratch& scratch);

 private:
  struct Group {  // rows of one expert: `size` pairs from `first` on
    int64_t expert, first, size;
  };
  void choose(const PackedLinear& router, const uint32_t* x, int64_t num_rows, const Scratch& scratch);
  void group(int64_t num_rows);
  void multiply(const PackedExperts& experts, const uint32_t* x, float* y, const Scratch& scratch);
  void multiply_group(const LinearTask& task, int64_t panel, const Group& group, float* scratch) const;
  int64_t words(int64_t size) const { return path_.is_bf16 ? (size + 1) / 2 : size; }

  const MixtureShape shape_;
  const Path& path_;
  Threads& threads_;
  const int64_t gate_up_panels_, down_panels_;
  // Of some rows: the router's logits, each row's experts and their weights.
  Memory logits_;
  std::vector<int32_t> chosen_;
  std::vector<float> weights_;
  // Pairs of a row and one of its experts, expert by expert: the row, the weight and, in words, what `down` reads.
  std::vector<Group> groups_;
  std::vector<int64_t> next_pair_, pair_rows_;
  std::vector<float> pair_weights_;
  Memory gated_;
};

}  // namespace baton
