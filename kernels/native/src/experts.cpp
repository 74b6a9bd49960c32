#include "experts.h"

#include <algorithm>
#include <stdexcept>

namespace baton {

namespace {

// Rows of an average expert that are computed at once: enough that its weights are read seldom, few enough that the memory of a step
// stays small: kRowsAnExpert * num_experts rows of an expert's intermediate size, 50 MB for 128 of 768 and 59 MB for 8 of 14336, in
// bfloat16.
constexpr int64_t kRowsAnExpert = 256;
constexpr int64_t kExpertsMax = 4096;
constexpr int64_t kHalfPanel = kPanel / 2;

}  // namespace

Mixture::Mixture(const MixtureShape& shape, const Path& path, Threads& threads)
    : shape_(shape), path_(path), threads_(threads), gate_up_panels_((shape.intermediate_size + kHalfPanel - 1) / kHalfPanel),
      down_panels_((shape.hidden_size + kPanel - 1) / kPanel) {
  if (shape.num_experts < 1 || shape.num_experts > kExpertsMax || shape.num_chosen < 1 || shape.num_chosen > shape.num_experts)
    throw std::runtime_error("a mixture has 1 to 4096 experts, of which a row chooses at least one");
}

void Mixture::place(PackedExperts* experts, Arena& arena) const {
  baton::place(&experts->router, arena, path_, shape_.num_experts, shape_.hidden_size);
  arena.take(sizeof(uint32_t) * shape_.num_experts * gate_up_panels_ * words(shape_.hidden_size) * kPanel, &experts->gate_up);
  arena.take(sizeof(uint32_t) * shape_.num_experts * down_panels_ * words(shape_.intermediate_size) * kPanel, &experts->down);
}

void Mixture::pack(const PackedExperts& to, const void* const* gate, const void* const* up, const void* const* down) {
  const int64_t hidden = shape_.hidden_size, inner = shape_.intermediate_size, value_bytes = path_.is_bf16 ? 2 : 4;
  auto row_of = [&](const void* weight, int64_t row, int64_t num_rows, int64_t num_in) -> const void* {
    return row < num_rows ? static_cast<const char*>(weight) + row * num_in * value_bytes : nullptr;
  };
  threads_.each(shape_.num_experts * gate_up_panels_, [&](int, int64_t i) {
    const int64_t expert = i / gate_up_panels_, first = i % gate_up_panels_ * kHalfPanel;
    const void* rows[kPanel];
    for (int64_t column = 0; column < kHalfPanel; ++column) {
      rows[column] = row_of(gate[expert], first + column, inner, hidden);
      rows[kHalfPanel + column] = row_of(up[expert], first + column, inner, hidden);
    }
    path_.pack_panel(to.gate_up + i * words(hidden) * kPanel, rows, hidden);
  });
  threads_.each(shape_.num_experts * down_panels_, [&](int, int64_t i) {
    const int64_t expert = i / down_panels_, first = i % down_panels_ * kPanel;
    const void* rows[kPanel];
    for (int64_t column = 0; column < kPanel; ++column) rows[column] = row_of(down[expert], first + column, hidden, inner);
    path_.pack_panel(to.down + i * words(inner) * kPanel, rows, inner);
  });
}

void Mixture::add(const PackedExperts& experts, const uint32_t* x, int64_t num_rows, float* y, const Scratch& scratch) {
  const int64_t most = kRowsAnExpert * shape_.num_experts / shape_.num_chosen, parts = (num_rows + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = num_rows * part / parts, size = num_rows * (part + 1) / parts - first;
    choose(experts.router, x + first * words(shape_.hidden_size), size, scratch);
    group(size);
    multiply(experts, x + first * words(shape_.hidden_size), y + first * shape_.hidden_size, scratch);
  }
}

void Mixture::choose(const PackedLinear& router, const uint32_t* x, int64_t num_rows, const Scratch& scratch) {
  logits_.reserve(sizeof(float) * num_rows * shape_.num_experts);
  chosen_.resize(num_rows * shape_.num_chosen);
  weights_.resize(num_rows * shape_.num_chosen);
  LinearTask task{};
  task.linear = &router;
  task.x = x, task.x_stride = router.num_words;
  task.num_rows = num_rows;
  task.after = After::kStore;
  task.y = logits_.as<float>(), task.y_stride = shape_.num_experts;
  run_linear(path_, threads_, task, scratch);
  const ChoiceTask choice{logits_.as<float>(), shape_.num_experts, shape_.num_chosen, shape_.normalize, chosen_.data(), weights_.data()};
  threads_.each_row(num_rows, [&](int thread, int64_t row) { path_.choose_experts(choice, row, scratch.of(thread)); });
}

// A counting sort: within an expert rows stay in order.
void Mixture::group(int64_t num_rows) {
  const int64_t num_pairs = num_rows * shape_.num_chosen;
  next_pair_.assign(shape_.num_experts, 0);
  for (int32_t expert : chosen_) ++next_pair_[expert];
  groups_.clear();
  int64_t first = 0;
  for (int64_t expert = 0; expert < shape_.num_experts; ++expert) {
    const int64_t size = next_pair_[expert];
    if (size) groups_.push_back({expert, first, size});
    next_pair_[expert] = first;
    first += size;
  }
  pair_rows_.resize(num_pairs);
  pair_weights_.resize(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) {
    const int64_t pair = next_pair_[chosen_[i]]++;
    pair_rows_[pair] = i / shape_.num_chosen;
    pair_weights_[pair] = weights_[i];
  }
  gated_.reserve(4 * num_pairs * words(shape_.intermediate_size));
}

void Mixture::multiply(const PackedExperts& experts, const uint32_t* x, float* y, const Scratch& scratch) {
  const int64_t hidden = shape_.hidden_size, hidden_words = words(hidden), inner_words = words(shape_.intermediate_size);
  threads_.each(groups_.size() * gate_up_panels_, [&](int thread, int64_t i) {
    const Group& group = groups_[i / gate_up_panels_];
    Linear gate_up;
    gate_up.words = experts.gate_up + group.expert * gate_up_panels_ * hidden_words * kPanel;
    gate_up.num_words = hidden_words, gate_up.num_panels = gate_up_panels_, gate_up.num_out = 2 * shape_.intermediate_size;
    LinearTask task{};
    task.linear = &gate_up;
    task.x = x, task.x_stride = hidden_words, task.x_rows = pair_rows_.data();
    task.after = After::kSiluMul;
    task.next = gated_.as<uint32_t>(), task.next_stride = inner_words;
    multiply_group(task, i % gate_up_panels_, group, scratch.of(thread));
  });
  threads_.each(down_panels_, [&](int thread, int64_t panel) {
    for (const Group& group : groups_) {
      Linear down;
      down.words = experts.down + (group.expert * down_panels_ + panel) * inner_words * kPanel;
      down.num_words = inner_words, down.num_panels = 1, down.num_out = std::min<int64_t>(kPanel, hidden - panel * kPanel);
      LinearTask task{};
      task.linear = &down;
      task.x = gated_.as<uint32_t>(), task.x_stride = inner_words;
      task.after = After::kAdd;
      task.y = y + panel * kPanel, task.y_stride = hidden, task.y_rows = pair_rows_.data(), task.y_weights = pair_weights_.data();
      multiply_group(task, 0, group, scratch.of(thread));
    }
  });
}

void Mixture::multiply_group(const LinearTask& task, int64_t panel, const Group& group, float* scratch) const {
  const int64_t slices = (group.size + kRowSlice - 1) / kRowSlice;
  for (int64_t slice = 0; slice < slices; ++slice) {
    const int64_t first = group.size * slice / slices, end = group.size * (slice + 1) / slices;
    path_.linear(task, panel, group.first + first, end - first, scratch);
  }
}

}  // namespace baton
