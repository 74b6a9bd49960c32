/* The C interface of the native kernels. Calls on one network come from one thread at a time; they release nothing of the caller's
 * but read what was handed over only during the call, unless `borrowed` is said. Status 0 is success, else see baton_error(). */
#ifndef BATON_NATIVE_H
#define BATON_NATIVE_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

typedef struct BatonNetwork BatonNetwork;

typedef struct {
  int32_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size;
  int32_t is_bf16; /* of weights, KV and embedding; else float32 */
  int32_t block_size; /* tokens; a multiple of 16 */
  int32_t num_threads;
  int32_t has_qkv_bias, has_output_bias, has_mlp_bias;
  int32_t has_embedding; /* in the arena; else it is borrowed */
  float norm_eps;
  float rotary_scale; /* of cosines and sines */
  const float* frequencies; /* [head_dim / 2] */
  const int64_t* windows; /* [num_layers] tokens a query sees, 0: all */
  const int64_t* has_experts; /* [num_layers] 1: it has, in place of the MLP; read where num_experts is not 0 */
  int32_t num_experts; /* of the layers that have them; 0: none has */
  int32_t num_experts_chosen, expert_intermediate_size;
  int32_t normalize_experts; /* the weights of a token's experts sum to one */
} BatonShape;

enum { BATON_QKV, BATON_OUTPUT, BATON_GATE_UP, BATON_DOWN, BATON_HEAD, BATON_ROUTER }; /* linears */
enum { BATON_ATTENTION_NORM, BATON_MLP_NORM, BATON_Q_NORM, BATON_K_NORM, BATON_FINAL_NORM };

/* One forward pass. Entry i computes the tokens at positions [starts[i], starts[i] + sizes[i]) of its sequence. */
typedef struct {
  int64_t num_entries;
  const int64_t* starts;
  const int64_t* sizes;
  const uint32_t* token_ids; /* of all entries in order */
  const uint32_t* tables; /* block tables of all entries in order ... */
  const int64_t* table_ends; /* ... and where each ends */
  int64_t num_logits;
  const int64_t* logit_entries; /* whose last tokens */
  float* logits; /* [num_logits][vocab_size] */
  int64_t* greedy; /* [num_logits]: the most likely token, -1 where a logit is not finite; or null */
  uint64_t* clock; /* or null; becomes clock_begin + i + 1 once KV of layer i is written, for who reads the pool meanwhile */
  uint64_t clock_begin;
} BatonStep;

/* One token to be drawn: kernels/sampling/reference.py says how. */
typedef struct {
  int64_t row; /* of the logits */
  uint64_t seed;
  uint32_t choice;
  int32_t top_k; /* 0: all */
  double top_p;
  float least_weight; /* of min_p, rounded up */
  float inverse_temperature; /* 0: the first of the greatest */
  double frequency_penalty, presence_penalty;
  float repetition_penalty;
  int32_t num_masked, num_biased;
  const uint32_t* masked; /* tokens that may not come */
  const uint32_t* biased;
  const float* biases;
  const uint32_t* token_ids; /* prompt and output so far */
  int64_t num_tokens, num_prompt_tokens;
} BatonDraw;

const char* baton_paths(void); /* what this machine can run, best first, joined by commas */
const char* baton_error(void); /* of this thread's last call */

BatonNetwork* baton_network_new(const BatonShape* shape, const char* path); /* null: see baton_error() */
void baton_network_free(BatonNetwork*);
/* Packed weights lie in an arena: memory that the caller owns, maps where and as it likes and keeps alive. It is set before weights are
 * packed into it; or it was packed by a network of the same shape and path, in this process or another, and is only read. */
int64_t baton_network_arena_bytes(const BatonNetwork*);
int baton_network_set_arena(BatonNetwork*, void* base); /* zeroed or packed; begins a page */
void* baton_map(int fd, int64_t bytes, int is_writable); /* a file's memory, or private (fd -1), in huge pages where it can be; null: baton_error() */
void baton_unmap(void* data, int64_t bytes);
/* weights[i] is [rows[i]][inputs] in the network's dtype, biases[i] [rows[i]] float32 or null; packed into the arena. layer is -1 for the head. */
int baton_network_set_linear(BatonNetwork*, int layer, int which, int num_parts, const void* const* weights, const int64_t* rows, const float* const* biases);
/* One pointer an expert, all in the network's dtype: gate and up [expert_intermediate_size][hidden_size], down the other way round; packed into
 * the arena. */
int baton_network_set_experts(BatonNetwork*, int layer, const void* const* gate, const void* const* up, const void* const* down);
int baton_network_set_norm(BatonNetwork*, int layer, int which, const float* weight); /* copied */
int baton_network_set_embedding(BatonNetwork*, void* table); /* [vocab_size][hidden_size]; borrowed, or copied into the arena */
int baton_network_set_pool(BatonNetwork*, void* blocks, int64_t num_blocks); /* borrowed: [block][layer][2][kv_head][token][dim] */
int baton_network_forward(BatonNetwork*, const BatonStep*);
/* token_ids[i]: drawn as draws[i] says from `logits` [rows][vocab_size]. */
int baton_network_draw(BatonNetwork*, const float* logits, int64_t num_draws, const BatonDraw* draws, int64_t* token_ids);

/* Single operations, for tests and measurements. x and y float32; weights, KV and what a linear reads are in the dtype. */
int baton_linear(const char* path, int is_bf16, int num_threads, const void* x, int64_t num_rows, int64_t num_in, const void* weight, int64_t num_out, const float* bias, float* y);
int baton_rms_norm(const char* path, int is_bf16, const float* x, const float* weight, int64_t num_rows, int64_t size, float eps, void* y);
int baton_silu_mul(const char* path, int is_bf16, const float* gate, const float* up, int64_t size, void* y);
int baton_rotary(const char* path, int is_bf16, float* qkv, int64_t num_rows, int num_heads, int num_kv_heads, int head_dim, const float* cos_sin, const float* q_norm, const float* k_norm, float eps, const int64_t* slots, int64_t block_size, void* q, void* kv);
int baton_attention(const char* path, int is_bf16, const void* q, int num_heads, int num_kv_heads, int head_dim, const void* kv, int64_t block_size, const uint32_t* table, int64_t start, int64_t num_tokens, int64_t window, float scale, void* out);
/* A router and its experts; y [num_rows][hidden] is added to. */
int baton_experts(const char* path, int is_bf16, int num_threads, const void* x, int64_t num_rows, int64_t hidden, const void* router, int64_t num_experts, int64_t num_chosen, int normalize, int64_t inner, const void* const* gate, const void* const* up, const void* const* down, float* y);
int baton_choose_experts(const char* path, const float* logits, int64_t num_rows, int64_t num_experts, int64_t num_chosen, int normalize, int32_t* experts, float* weights);
int baton_greedy(const char* path, const float* logits, int64_t num_rows, int64_t vocab_size, int64_t* token_ids);
int baton_weigh(const char* path, const float* logits, int64_t size, float inverse_temperature, float* weights); /* of drawing */
int baton_draw(const char* path, const float* logits, int64_t vocab_size, int64_t num_draws, const BatonDraw* draws, int64_t* token_ids);

/* runs[i] is {source offset, target offset, size} in bytes. Holds no lock and allocates nothing.
 * -1, or the index of the first run that leaves its buffer, and then nothing is copied. */
int64_t baton_copy_runs(const char* source, int64_t source_bytes, char* target, int64_t target_bytes, const int64_t* runs, int64_t num_runs);
/* The same of bytes [start, start + size) of each block: source_ids[i] to target_ids[i]. */
int64_t baton_copy_blocks(const char* source, int64_t source_blocks, char* target, int64_t target_blocks, int64_t block_bytes, int64_t start, int64_t size, const uint32_t* source_ids, const uint32_t* target_ids, int64_t num_pairs);
/* runs[i] is {offset, size} in bytes of `buffer`; cursor is {run, bytes done of it} and moves on. Never waits.
 * BATON_CARRIED: all is done; BATON_WOULD_BLOCK; BATON_PEER_ENDED; or -errno, -EFAULT where a run leaves the buffer. */
enum { BATON_WOULD_BLOCK = 0, BATON_CARRIED = 1, BATON_PEER_ENDED = 2 };
int baton_send_runs(int fd, const char* buffer, int64_t buffer_bytes, const int64_t* runs, int64_t num_runs, int64_t* cursor);
int baton_receive_runs(int fd, char* buffer, int64_t buffer_bytes, const int64_t* runs, int64_t num_runs, int64_t* cursor);

/* Measurements: bytes a second of reading `bytes` of memory; multiply-adds a second from the first-level cache. */
double baton_measure_stream(int num_threads, int64_t bytes, int num_rounds);
double baton_measure_peak(const char* path, int is_bf16, int num_threads, int64_t num_rounds);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
