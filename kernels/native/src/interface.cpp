// The C interface: exceptions become status and text; single operations for tests and measurements.
#include <string.h>

#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "network.h"

using namespace baton;

struct BatonNetwork : Network {
  using Network::Network;
};

namespace {

thread_local std::string error;

template <typename Body>
int guarded(const Body& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& failure) {
    error = failure.what();
    return 1;
  }
}

bool supports(const std::string& path) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (path == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (path == "avx512") return avx512;
  if (path == "avx2") return avx2;
#endif
  return path == "portable";
}

// Rows of values as rows of words, of which an odd bfloat16 row fills the last by half.
Memory rows_of_words(const void* x, int64_t num_rows, int64_t size, int is_bf16) {
  const int64_t row_bytes = size * (is_bf16 ? 2 : 4), stride = (row_bytes + 3) / 4 * 4;
  Memory rows(num_rows * stride + 4);
  for (int64_t i = 0; i < num_rows; ++i) memcpy(rows.as<char>() + i * stride, static_cast<const char*>(x) + i * row_bytes, row_bytes);
  return rows;
}

double seconds_since(std::chrono::steady_clock::time_point start) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); }

}  // namespace

namespace baton {

const char* supported_paths() {
  static const std::string paths = [] {
    std::string all;
    for (const char* path : {"avx512_bf16", "avx512", "avx2", "portable"})
      if (supports(path)) all += (all.empty() ? "" : ",") + std::string(path);
    return all;
  }();
  return paths.c_str();
}

const Path& find_path(const char* name, bool is_bf16) {
  if (!supports(name)) throw std::runtime_error(std::string("this machine cannot run the instruction path ") + name + "; it has " + supported_paths());
#if defined(__x86_64__)
  if (!strcmp(name, "avx512_bf16")) return *path_avx512_bf16(is_bf16);
  if (!strcmp(name, "avx512")) return *path_avx512(is_bf16);
  if (!strcmp(name, "avx2")) return *path_avx2(is_bf16);
#endif
  return *path_portable(is_bf16);
}

}  // namespace baton

extern "C" {

const char* baton_paths(void) { return supported_paths(); }
const char* baton_error(void) { return error.c_str(); }

BatonNetwork* baton_network_new(const BatonShape* shape, const char* path) {
  BatonNetwork* network = nullptr;
  guarded([&] { network = new BatonNetwork(*shape, path); });
  return network;
}

void baton_network_free(BatonNetwork* network) { delete network; }

int baton_network_set_linear(BatonNetwork* network, int layer, int which, int num_parts, const void* const* weights, const int64_t* rows, const float* const* biases) {
  return guarded([&] { network->set_linear(layer, which, num_parts, weights, rows, biases); });
}
int baton_network_set_experts(BatonNetwork* network, int layer, const void* const* gate, const void* const* up, const void* const* down) {
  return guarded([&] { network->set_experts(layer, gate, up, down); });
}
int baton_network_set_norm(BatonNetwork* network, int layer, int which, const float* weight) {
  return guarded([&] { network->set_norm(layer, which, weight); });
}
int baton_network_set_embedding(BatonNetwork* network, void* table) {
  return guarded([&] { network->set_embedding(static_cast<char*>(table)); });
}
int baton_network_set_pool(BatonNetwork* network, void* blocks, int64_t num_blocks) {
  return guarded([&] { network->set_pool(blocks, num_blocks); });
}
int baton_network_forward(BatonNetwork* network, const BatonStep* step) {
  return guarded([&] { network->forward(*step); });
}
int baton_network_draw(BatonNetwork* network, const float* logits, int64_t num_draws, const BatonDraw* draws, int64_t* token_ids) {
  return guarded([&] { network->draw(logits, num_draws, draws, token_ids); });
}
int64_t baton_network_arena_bytes(const BatonNetwork* network) { return network->arena_bytes(); }
int baton_network_set_arena(BatonNetwork* network, void* base) {
  return guarded([&] { network->set_arena(base); });
}

void* baton_map(int fd, int64_t bytes, int is_writable) {
  void* data = nullptr;
  guarded([&] { data = map_memory(fd, bytes, is_writable); });
  return data;
}
void baton_unmap(void* data, int64_t bytes) { unmap_memory(data, bytes); }

int baton_linear(const char* path, int is_bf16, int num_threads, const void* x, int64_t num_rows, int64_t num_in, const void* weight, int64_t num_out, const float* bias, float* y) {
  return guarded([&] {
    const Path& kernels = find_path(path, is_bf16);
    Threads threads(num_threads);
    PackedLinear packed;
    Arena arena;
    place(&packed, arena, kernels, num_out, num_in, false, bias != nullptr);
    const Memory memory(arena.bytes());
    arena.put(memory.as<void>());
    pack(packed, kernels, threads, 1, &weight, &num_out, &bias);
    const Memory words = rows_of_words(x, num_rows, num_in, is_bf16);
    LinearTask task{};
    task.linear = &packed, task.x = words.as<uint32_t>(), task.x_stride = packed.num_words, task.num_rows = num_rows;
    task.after = After::kStore, task.y = y, task.y_stride = num_out;
    run_linear(kernels, threads, task, Scratch(scratch_floats(64), num_threads));
  });
}

int baton_experts(const char* path, int is_bf16, int num_threads, const void* x, int64_t num_rows, int64_t hidden, const void* router, int64_t num_experts, int64_t num_chosen, int normalize, int64_t inner, const void* const* gate, const void* const* up, const void* const* down, float* y) {
  return guarded([&] {
    const Path& kernels = find_path(path, is_bf16);
    Threads threads(num_threads);
    Mixture mixture({hidden, num_experts, num_chosen, inner, normalize != 0}, kernels, threads);
    PackedExperts packed;
    Arena arena;
    mixture.place(&packed, arena);
    const Memory memory(arena.bytes());
    arena.put(memory.as<void>());
    pack(packed.router, kernels, threads, 1, &router, &num_experts, nullptr);
    mixture.pack(packed, gate, up, down);
    mixture.add(packed, rows_of_words(x, num_rows, hidden, is_bf16).as<uint32_t>(), num_rows, y, Scratch(scratch_floats(64), num_threads));
  });
}

int baton_choose_experts(const char* path, const float* logits, int64_t num_rows, int64_t num_experts, int64_t num_chosen, int normalize, int32_t* experts, float* weights) {
  return guarded([&] {
    const ChoiceTask task{logits, num_experts, num_chosen, normalize != 0, experts, weights};
    std::vector<float> scratch(num_experts);
    for (int64_t row = 0; row < num_rows; ++row) find_path(path, false).choose_experts(task, row, scratch.data());
  });
}

int baton_rms_norm(const char* path, int is_bf16, const float* x, const float* weight, int64_t num_rows, int64_t size, float eps, void* y) {
  return guarded([&] {
    const Path& kernels = find_path(path, is_bf16);
    const int64_t stride = is_bf16 ? (size + 1) / 2 : size;
    NormTask task{x, size, nullptr, weight, eps, size, static_cast<uint32_t*>(y), stride};
    for (int64_t row = 0; row < num_rows; ++row) kernels.norm(task, row);
  });
}

int baton_silu_mul(const char* path, int is_bf16, const float* gate, const float* up, int64_t size, void* y) {
  return guarded([&] { find_path(path, is_bf16).silu_mul(gate, up, static_cast<uint32_t*>(y), size); });
}

int baton_rotary(const char* path, int is_bf16, float* qkv, int64_t num_rows, int num_heads, int num_kv_heads, int head_dim, const float* cos_sin, const float* q_norm, const float* k_norm, float eps, const int64_t* slots, int64_t block_size, void* q, void* kv) {
  return guarded([&] {
    const Path& kernels = find_path(path, is_bf16);
    const int64_t value_bytes = is_bf16 ? 2 : 4, size = (num_heads + 2 * num_kv_heads) * int64_t{head_dim};
    RotaryTask task{qkv, size, q_norm, k_norm, eps, num_heads, num_kv_heads, head_dim, cos_sin, static_cast<uint32_t*>(q), num_heads * head_dim * value_bytes / 4,
                    slots, static_cast<char*>(kv), 2 * num_kv_heads * block_size * head_dim * value_bytes, block_size};
    for (int64_t row = 0; row < num_rows; ++row) kernels.rotary(task, row);
  });
}

int baton_attention(const char* path, int is_bf16, const void* q, int num_heads, int num_kv_heads, int head_dim, const void* kv, int64_t block_size, const uint32_t* table, int64_t start, int64_t num_tokens, int64_t window, float scale, void* out) {
  return guarded([&] {
    const Path& kernels = find_path(path, is_bf16);
    const int64_t value_bytes = is_bf16 ? 2 : 4, stride = num_heads * int64_t{head_dim} * value_bytes / 4;
    const int64_t most = kTileRows / (num_heads / num_kv_heads);
    Memory scratch(sizeof(float) * scratch_floats(head_dim));
    for (int64_t first = 0; first < num_tokens; first += most) {
      AttentionItem item{table, first, start + first, static_cast<int>(num_tokens - first < most ? num_tokens - first : most)};
      AttentionTask task{static_cast<const uint32_t*>(q), stride, static_cast<const char*>(kv), 2 * num_kv_heads * block_size * head_dim * value_bytes, block_size,
                         num_heads, num_kv_heads, head_dim, window, scale, static_cast<uint32_t*>(out), stride};
      const int rows = item.num_tokens * (num_heads / num_kv_heads), together = rows > kFewRows ? 1 : std::min(num_kv_heads, kTileRows / rows);
      for (int head = 0; head < num_kv_heads; head += together)
        kernels.attention(task, {&item, head, std::min(together, num_kv_heads - head), nullptr, 0}, scratch.as<float>());
    }
  });
}

int baton_greedy(const char* path, const float* logits, int64_t num_rows, int64_t vocab_size, int64_t* token_ids) {
  return guarded([&] {
    const Path& kernels = find_path(path, false);
    for (int64_t i = 0; i < num_rows; ++i) token_ids[i] = kernels.greedy(logits + i * vocab_size, vocab_size);
  });
}

int baton_weigh(const char* path, const float* logits, int64_t size, float inverse_temperature, float* weights) {
  return guarded([&] {
    const Path& kernels = find_path(path, false);
    std::vector<double> masses((size + kMassBlock - 1) / kMassBlock);
    kernels.weigh_logits(logits, size, kernels.greatest(logits, size), inverse_temperature, weights, masses.data());
  });
}

int baton_draw(const char* path, const float* logits, int64_t vocab_size, int64_t num_draws, const BatonDraw* draws, int64_t* token_ids) {
  return guarded([&] {
    const Path& kernels = find_path(path, false);
    DrawScratch scratch;
    for (int64_t i = 0; i < num_draws; ++i) check_draw(draws[i], vocab_size), token_ids[i] = draw_token(kernels, logits + draws[i].row * vocab_size, vocab_size, draws[i], &scratch);
  });
}

double baton_measure_stream(int num_threads, int64_t bytes, int num_rounds) {
  double best = 0;
  guarded([&] {
    Threads threads(num_threads);
    Memory memory(bytes);
    memset(memory.as<char>(), 1, bytes);
    constexpr int64_t kPiece = 256 << 10;
    std::vector<uint64_t> sums(num_threads * 8);
    for (int round = 0; round < num_rounds; ++round) {
      auto start = std::chrono::steady_clock::now();
      threads.each(bytes / kPiece, [&](int thread, int64_t i) {
        const auto* words = reinterpret_cast<const uint64_t*>(memory.as<char>() + i * kPiece);
        uint64_t sum[8] = {};
        for (int64_t k = 0; k < kPiece / 8; k += 8)
          for (int j = 0; j < 8; ++j) sum[j] += words[k + j];
        for (int j = 0; j < 8; ++j) sums[thread * 8 + j] += sum[j];
      });
      const double rate = bytes / kPiece * kPiece / seconds_since(start);
      best = rate > best ? rate : best;
    }
    if (sums[0] == 42) best = 0;
  });
  return best;
}

double baton_measure_peak(const char* path, int is_bf16, int num_threads, int64_t num_rounds) {
  double rate = 0;
  guarded([&] {
    const Path& kernels = find_path(path, is_bf16);
    Threads threads(num_threads);
    const int64_t pieces = num_threads * 8;
    std::vector<float> kept(num_threads);
    threads.each(pieces, [&](int thread, int64_t) { kept[thread] += kernels.peak(num_rounds / 8); });
    auto start = std::chrono::steady_clock::now();
    threads.each(pieces, [&](int thread, int64_t) { kept[thread] += kernels.peak(num_rounds); });
    rate = pieces * double(num_rounds) * kPeakWords * 6 * kPanel * (is_bf16 ? 2 : 1) / seconds_since(start);
  });
  return rate;
}

}  // extern "C"
