// What one instruction path offers, and the records its functions read. Structs only: a function here would be compiled
// once a path, and the linker could keep the copy that needs AVX-512.
#pragma once
#include <stdint.h>

namespace baton {

constexpr int kPanel = 64;     // output features that lie side by side in packed weights
constexpr int kKeyTile = 64;   // keys attended together; tiles start at multiples of it
constexpr int kRun = 16;         // the block size is a multiple of it
constexpr int kMaxHeadDim = 512;
constexpr int kRowSlice = 192; // rows of a linear computed by one thread at a time
constexpr int kTileRows = 192;  // rows (tokens x heads of a group) of one attention item
constexpr int kBatchRowsMost = 12;  // of these, weighed together
constexpr int kFewRows = 6;  // rows a KV head of an item whose heads stay together: as many as the widest register tile holds
constexpr int kLanesMax = 16;
constexpr int kMassBlock = 512;  // neighbouring tokens whose weights are summed together, to find one among them sooner
constexpr double kWeightUnit = 0x1p-34;  // of weights up to 1: their sums are exact in double up to 2^19 tokens
constexpr int kKSlice = 2048;  // words of a panel passed over at once, so that it stays in the second-level cache

// A *word* is 32 bits along the inputs: one float, or two neighbouring bfloat16. Packed weights of `num_out` x `num_in`:
//     [panel][word of the inputs][64 outputs]
// which is also how a tile of keys is laid out (outputs: keys) and a tile of values (inputs: keys, outputs: dims).
struct Linear {
  uint32_t* words = nullptr;
  float* bias = nullptr;  // [num_panels * 64] or null
  int64_t num_words = 0;  // of one output
  int64_t num_panels = 0;
  int64_t num_out = 0;
};

enum class After { kStore, kAdd, kSiluMul };  // what becomes of a product: y =, y +=, next input = silu(left half) * right half

struct LinearTask {
  const Linear* linear;
  const uint32_t* x;      // rows of words
  int64_t x_stride;       // in words
  const int64_t* x_rows;  // null: row i is row i of x
  int64_t num_rows;
  After after;
  float* y;  // kStore, kAdd
  int64_t y_stride;
  const int64_t* y_rows;   // null: row i becomes row i of y
  const float* y_weights;  // of each row, which is multiplied with its own first; null: as it is
  uint32_t* next;  // kSiluMul: rows of words
  int64_t next_stride;
};

struct NormTask {
  const float* x;
  int64_t x_stride;
  const int64_t* rows;  // null: row i is row i of x
  const float* weight;
  float eps;
  int64_t size;
  uint32_t* y;  // rows of words
  int64_t y_stride;
};

struct RotaryTask {
  float* qkv;  // [rows][(num_heads + 2 num_kv_heads) * head_dim]
  int64_t qkv_stride;
  const float* q_norm;  // null: none
  const float* k_norm;
  float eps;
  int num_heads, num_kv_heads, head_dim;
  const float* cos_sin;  // [rows][head_dim]: cosines, then sines
  uint32_t* q;           // rows of words
  int64_t q_stride;
  const int64_t* slots;  // of each row: block * block_size + offset
  char* kv;              // this layer of block 0
  int64_t block_bytes;   // from one block to the next
  int64_t block_size;    // tokens
};

struct ChoiceTask {
  const float* logits;  // [rows][num_experts]
  int64_t num_experts, num_chosen;
  bool normalize;    // the weights of a row sum to one; else they are shares of the softmax over all experts
  int32_t* experts;  // [rows][num_chosen], ascending: the likeliest, of equally likely ones those of lower id
  float* weights;    // [rows][num_chosen]
};

struct AttentionItem {  // some consecutive tokens of one sequence
  const uint32_t* table;
  int64_t first_row;
  int64_t start;  // position of first_row
  int num_tokens;
};

struct AttentionPiece {  // what one thread computes at a time
  const AttentionItem* item;
  int first_head, num_heads;  // KV heads; of an item with few rows a head as many as kTileRows allows, else one
  const AttentionItem* next;  // of the piece this thread most likely computes next: fetched ahead; null: there is none
  int next_head;
};

struct AttentionTask {
  const uint32_t* q;
  int64_t q_stride;
  const char* kv;
  int64_t block_bytes, block_size;
  int num_heads, num_kv_heads, head_dim;
  int64_t window;  // 0: none
  float scale;
  uint32_t* out;  // rows of words
  int64_t out_stride;
};

struct Above {  // of the logits above a limit
  int64_t count;
  double mass;           // sum of their weights
  float least;           // infinity: none
  float greatest_other;  // of those that are not above; -infinity: none
};

struct Path {
  const char* name;
  bool is_bf16;
  // rows[64]: the outputs of one panel, null where there is none
  void (*pack_panel)(uint32_t* panel, const void* const* rows, int64_t num_in);
  void (*linear)(const LinearTask&, int64_t panel, int64_t first_row, int64_t num_rows, float* scratch);
  void (*norm)(const NormTask&, int64_t row);
  void (*rotary)(const RotaryTask&, int64_t row);
  void (*attention)(const AttentionTask&, const AttentionPiece&, float* scratch);
  void (*widen)(float* y, const void* x, int64_t size);
  void (*silu_mul)(const float* gate, const float* up, uint32_t* y, int64_t size);
  // Index of the first of the greatest; -1: not all are finite.
  int64_t (*greedy)(const float* x, int64_t size);
  void (*choose_experts)(const ChoiceTask&, int64_t row, float* scratch);  // scratch: [num_experts]
  float (*peak)(int64_t num_rounds);  // multiply-adds from the first-level cache, for measuring
  // Drawing (draws.h).
  float (*greatest)(const float* x, int64_t size);
  double (*weigh_logits)(const float* logits, int64_t size, float top, float inverse_temperature, float* weights, double* masses);
  Above (*above)(const float* logits, const float* weights, int64_t size, float limit);
  int64_t (*gather)(const float* logits, const float* weights, int64_t size, float low, float high, float* to_logits, float* to_weights);
  int64_t (*keep)(const float* logits, float* weights, int64_t size, float least_logit, float least_weight, double* masses);
};

constexpr int64_t kPeakWords = 64;  // `peak` does num_rounds * kPeakWords * 6 * 64 word products

// Floats one thread needs: result tiles of a linear, or keys, values, scores and weights of a batch of rows and sums of an attention item.
constexpr int64_t scratch_floats(int64_t head_dim) {
  const int64_t dims = (head_dim + kPanel - 1) / kPanel * kPanel, attention = kPanel * (head_dim + dims + 2 * kBatchRowsMost) + kTileRows * dims;
  return attention > kRowSlice * kPanel ? attention : kRowSlice * kPanel;
}

const Path* path_avx512_bf16(bool bf16);
const Path* path_avx512(bool bf16);
const Path* path_avx2(bool bf16);
const Path* path_portable(bool bf16);

}  // namespace baton
