// Many small copies in one call. Scattered over large pools, a copy waits for its first lines and their pages longer than for its
// bytes, so those of the run after next are asked for meanwhile: 64 MiB in runs of 4 KiB went from 6.5 to 7.9 GB/s, larger runs
// and totals that fit the cache stayed as they were (Zen 5, one thread).
#include <string.h>

#include "baton_native.h"

namespace {

constexpr int64_t kAheadRuns = 2;
constexpr int64_t kAheadBytes = 512;

void fetch(const char* source, const char* target, int64_t size) {
  for (int64_t i = 0; i < size && i < kAheadBytes; i += 64) {
    __builtin_prefetch(source + i, 0);
    __builtin_prefetch(target + i, 1);
  }
}

bool lies_within(int64_t start, int64_t size, int64_t bytes) { return start >= 0 && size >= 0 && size <= bytes && start <= bytes - size; }

}  // namespace

extern "C" int64_t baton_copy_runs(
    const char* source, int64_t source_bytes, char* target, int64_t target_bytes, const int64_t* runs, int64_t num_runs) {
  for (int64_t i = 0; i < num_runs; ++i) {
    const int64_t* run = runs + 3 * i;
    if (!lies_within(run[0], run[2], source_bytes) || !lies_within(run[1], run[2], target_bytes)) return i;
  }
  for (int64_t i = 0; i < num_runs; ++i) {
    const int64_t* run = runs + 3 * i;
    if (i + kAheadRuns < num_runs) {
      const int64_t* later = run + 3 * kAheadRuns;
      fetch(source + later[0], target + later[1], later[2]);
    }
    memcpy(target + run[1], source + run[0], static_cast<size_t>(run[2]));
  }
  return -1;
}

extern "C" int64_t baton_copy_blocks(const char* source, int64_t source_blocks, char* target, int64_t target_blocks, int64_t block_bytes,
                                     int64_t start, int64_t size, const uint32_t* source_ids, const uint32_t* target_ids, int64_t num_pairs) {
  if (!lies_within(start, size, block_bytes)) return 0;
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (source_ids[i] >= source_blocks || target_ids[i] >= target_blocks) return i;
  }
  source += start;
  target += start;
  for (int64_t i = 0; i < num_pairs; ++i) {
    if (i + kAheadRuns < num_pairs) {
      fetch(source + source_ids[i + kAheadRuns] * block_bytes, target + target_ids[i + kAheadRuns] * block_bytes, size);
    }
    memcpy(target + target_ids[i] * block_bytes, source + source_ids[i] * block_bytes, static_cast<size_t>(size));
  }
  return -1;
}
