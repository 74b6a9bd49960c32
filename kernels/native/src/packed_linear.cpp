#include "packed_linear.h"

#include <algorithm>
#include <stdexcept>

namespace baton {

static void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

void Arena::put(void* base) {
  for (const Piece& piece : pieces_) piece.point(piece.slot, static_cast<char*>(base) + piece.at);
}

void place(PackedLinear* linear, Arena& arena, const Path& path, int64_t num_out, int64_t num_in, bool halves, bool has_bias) {
  linear->num_in = num_in, linear->halves = halves;
  linear->num_out = num_out;
  linear->num_words = path.is_bf16 ? (num_in + 1) / 2 : num_in;
  linear->num_panels = halves ? (num_out / 2 + kPanel / 2 - 1) / (kPanel / 2) : (num_out + kPanel - 1) / kPanel;
  arena.take(sizeof(uint32_t) * linear->num_panels * linear->num_words * kPanel, &linear->words);
  if (has_bias) arena.take(sizeof(float) * linear->num_panels * kPanel, &linear->bias);
}

void pack(const PackedLinear& to, const Path& path, Threads& threads, int num_parts, const void* const* weights, const int64_t* rows,
          const float* const* biases) {
  require(to.words, "there is no such linear, or no arena yet to pack it into");
  int64_t num_out = 0;
  for (int i = 0; i < num_parts; ++i) {
    num_out += rows[i];
    require(to.bias || !biases || !biases[i], "a linear without a bias was given one");
  }
  require(num_out == to.num_out, "a linear has another number of outputs than the shape says");
  const int64_t half = num_out / 2, value_bytes = path.is_bf16 ? 2 : 4;
  threads.each(to.num_panels, [&](int, int64_t panel) {
    const void* panel_rows[kPanel];
    for (int64_t column = 0; column < kPanel; ++column) {
      int64_t row = panel * kPanel + column;
      if (to.halves) {
        row = panel * (kPanel / 2) + column % (kPanel / 2);
        row = row >= half ? num_out : column < kPanel / 2 ? row : row + half;
      }
      panel_rows[column] = nullptr;
      int part = 0;
      for (; part < num_parts && row >= rows[part]; ++part) row -= rows[part];
      if (part == num_parts) continue;
      panel_rows[column] = static_cast<const char*>(weights[part]) + row * to.num_in * value_bytes;
      if (biases && biases[part]) to.bias[panel * kPanel + column] = biases[part][row];
    }
    path.pack_panel(to.words + panel * to.num_words * kPanel, panel_rows, to.num_in);
  });
}

// A step of prefill reads each layer's output many times and of decode once: slices of rows outside, panels inside.
static int64_t num_slices(int64_t num_rows) { return (num_rows + kRowSlice - 1) / kRowSlice; }

void run_linear(const Path& path, Threads& threads, const LinearTask& task, const Scratch& scratch) {
  const int64_t panels = task.linear->num_panels, slices = num_slices(task.num_rows);
  const int64_t slice_rows = (task.num_rows + slices - 1) / slices;
  threads.each(panels * slices, [&](int thread, int64_t i) {
    const int64_t first = i / panels * slice_rows;
    path.linear(task, i % panels, first, std::min(slice_rows, task.num_rows - first), scratch.of(thread));
  });
}

}  // namespace baton
