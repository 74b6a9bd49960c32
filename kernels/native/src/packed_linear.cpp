#include "packed_linear.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace baton {

Memory::~Memory() {
  if (data_) munmap(data_, bytes_);
}

void Memory::reserve(size_t bytes) {
  if (bytes <= bytes_) return;
  constexpr size_t kHuge = size_t{2} << 20;
  if (bytes >= kHuge) bytes = (bytes + kHuge - 1) / kHuge * kHuge;
  if (data_) munmap(data_, bytes_);
  data_ = nullptr, bytes_ = 0;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  if (bytes >= kHuge) madvise(data, bytes, MADV_HUGEPAGE);
  data_ = data, bytes_ = bytes;
}

void pack(PackedLinear* to, const Path& path, Threads& threads, int num_parts, const void* const* weights, const int64_t* rows,
          const float* const* biases, int64_t num_in, bool halves) {
  int64_t num_out = 0;
  bool has_bias = false;
  for (int i = 0; i < num_parts; ++i) num_out += rows[i], has_bias |= biases && biases[i];
  const int64_t half = num_out / 2, value_bytes = path.is_bf16 ? 2 : 4;
  to->num_out = num_out;
  to->num_words = path.is_bf16 ? (num_in + 1) / 2 : num_in;
  to->num_panels = halves ? (half + kPanel / 2 - 1) / (kPanel / 2) : (num_out + kPanel - 1) / kPanel;
  to->memory.reserve(sizeof(uint32_t) * to->num_panels * to->num_words * kPanel);
  to->words = to->memory.as<uint32_t>();
  if (has_bias) {
    to->bias_memory.reserve(sizeof(float) * to->num_panels * kPanel);
    to->bias = to->bias_memory.as<float>();
  }
  threads.each(to->num_panels, [&](int, int64_t panel) {
    const void* panel_rows[kPanel];
    for (int64_t column = 0; column < kPanel; ++column) {
      int64_t row = panel * kPanel + column;
      if (halves) {
        row = panel * (kPanel / 2) + column % (kPanel / 2);
        row = row >= half ? num_out : column < kPanel / 2 ? row : row + half;
      }
      panel_rows[column] = nullptr;
      int part = 0;
      for (; part < num_parts && row >= rows[part]; ++part) row -= rows[part];
      if (part == num_parts) continue;
      panel_rows[column] = static_cast<const char*>(weights[part]) + row * num_in * value_bytes;
      if (has_bias && biases[part]) to->bias[panel * kPanel + column] = biases[part][row];
    }
    path.pack_panel(to->words + panel * to->num_words * kPanel, panel_rows, num_in);
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
