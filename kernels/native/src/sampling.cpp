#include "sampling.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>

namespace baton {

namespace {

constexpr int64_t kFew = 4096;     // logits worth copying out rather than passing over all of them again
constexpr int64_t kSample = 1024;  // of a row, to guess by

// In the order of falling logits, equal ones in that of their ids, some are kept: those above `logit` and the first `num_equal` equal to it.
struct Cut {
  float logit = -INFINITY;
  int64_t num_equal = 0;
};

struct Row {
  const Path& path;
  const float* logits;
  int64_t size;
  float top, inverse_temperature;
  float* weights;
  double* masses;
  DrawScratch* scratch;
};

// Philox4x32-10 (kernels/sampling/philox.py): the number in [0, 1) named by seed, choice and position.
double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
  uint32_t c0 = position, c1 = choice, c2 = 0, c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return static_cast<double>((uint64_t{c0} << 32 | c1) >> 11) * 0x1p-53;
}

bool is_adjusted(const BatonDraw& d) {
  return d.num_biased || d.num_masked || d.repetition_penalty != 1.0f || d.frequency_penalty != 0 || d.presence_penalty != 0;
}

// logit_bias, min_tokens mask, penalties.
void adjust(float* row, int64_t vocab_size, const BatonDraw& d, std::vector<uint32_t>* counts) {
  for (int64_t i = 0; i < d.num_biased; ++i) row[d.biased[i]] += d.biases[i];
  for (int64_t i = 0; i < d.num_masked; ++i)
    if (d.masked[i] < vocab_size) row[d.masked[i]] = -INFINITY;
  counts->resize(vocab_size);
  uint32_t* seen = counts->data();
  if (d.repetition_penalty != 1.0f) {
    for (int64_t i = 0; i < d.num_tokens; ++i) {
      if (seen[d.token_ids[i]]++) continue;
      float& logit = row[d.token_ids[i]];
      logit = logit > 0 ? logit / d.repetition_penalty : logit * d.repetition_penalty;
    }
    for (int64_t i = 0; i < d.num_tokens; ++i) seen[d.token_ids[i]] = 0;
  }
  if (d.frequency_penalty != 0 || d.presence_penalty != 0) {
    for (int64_t i = d.num_prompt_tokens; i < d.num_tokens; ++i) ++seen[d.token_ids[i]];
    for (int64_t i = d.num_prompt_tokens; i < d.num_tokens; ++i) {
      uint32_t& count = seen[d.token_ids[i]];
      if (count) row[d.token_ids[i]] += static_cast<float>(-(d.frequency_penalty * count + d.presence_penalty));
      count = 0;
    }
  }
}

// Some logits of a row with their weights, and what lies above all of them.
struct Part {
  const float *logits, *weights;
  int64_t size;
  Above over;
};

struct Limit {
  float logit;
  Above over, with_equal;  // what lies above it, and with those equal to it
};

// Those of `part` in (low, high], of which there are at most kFew and `over` above; they lie in `few` until it is used again.
Part gather(const Row& row, const Part& part, float low, float high, const Above& over, std::vector<float>* few) {
  few->resize(2 * (kFew + kLanesMax));
  float *logits = few->data(), *weights = logits + kFew + kLanesMax;
  const int64_t size = row.path.gather(part.logits, part.weights, part.size, low, high, logits, weights);
  return {logits, weights, size, over};
}

// The greatest logit of a part above which less than `goal` lies (of `measure`), by narrowing an interval (low, high]. `guesses` are
// looked at before its middle, the last one first. The count above `low` may be estimated too high. Where not even all above `low` is
// as much as `goal`, the logit is not above it.
template <typename Measure>
Limit find_limit(const Row& row, Part part, float low, Above at_low, float high, double goal, const Measure& measure, std::vector<float> guesses) {
  Above over = part.over;
  for (;;) {
    if (part.size > kFew && at_low.count - over.count <= kFew) part = gather(row, part, low, high, over, &row.scratch->few);
    float middle = low / 2 + high / 2;
    if (!(middle > low && middle < high)) return {high, over, at_low};
    if (!guesses.empty()) {
      const float guess = guesses.back();
      guesses.pop_back();
      if (!(guess > low && guess < high)) continue;
      middle = guess;
    }
    Above found = row.path.above(part.logits, part.weights, part.size, middle);
    found.count += part.over.count, found.mass += part.over.mass;
    if (measure(found) >= goal) {
      low = middle, at_low = found;
      if (found.least == high) return {high, over, at_low};
    } else {
      high = found.greatest_other, over = found;
      if (high <= low) return {high, over, at_low};
    }
  }
}

double count_of(const Above& a) { return static_cast<double>(a.count); }
double mass_of(const Above& a) { return a.mass; }

// From some of the logits, evenly spread: about where `count` lie above, and a little below and above where `share` of the mass does.
std::vector<float> guess_limits(const Row& row, float low, int64_t count, double share) {
  if (row.size < 4 * kFew) return {};
  const int64_t step = row.size / kSample;
  std::vector<float>&logits = row.scratch->sample_logits, &weights = row.scratch->sample_weights;
  logits.resize(kSample), weights.resize(kSample);
  double mass = 0;
  for (int64_t i = 0; i < kSample; ++i) mass += weights[i] = row.weights[i * step], logits[i] = row.logits[i * step];
  const Part part{logits.data(), weights.data(), kSample, {}};
  const Above all{kSample, mass, 0, 0};
  const float top = row.path.greatest(logits.data(), kSample);
  const double expected = static_cast<double>(count) / static_cast<double>(step);
  std::vector<float> guesses;
  if (share < 1.0 && mass > 0 && top > low)
    for (double off : {0.05, -0.05}) {
      const double goal = (share + off) * mass;
      if (goal > 0 && goal <= mass) guesses.push_back(find_limit(row, part, low, all, top, goal, mass_of, {}).logit);
    }
  const double goal = ceil(expected + 3 * sqrt(expected) + 3);
  if (goal <= count_of(row.path.above(logits.data(), weights.data(), kSample, low)))
    guesses.push_back(find_limit(row, part, low, all, top, goal, count_of, {}).logit);
  return guesses;
}

Cut cut_to(const Row& row, double mass, int64_t top_k, double top_p) {
  // Below it every weight is 0: 32 or more below the greatest, however the difference is rounded.
  const float low = std::max(std::min(row.top - 64 / row.inverse_temperature, nextafterf(row.top, -INFINITY)), -FLT_MAX);
  Cut cut;
  Part part{row.logits, row.weights, row.size, {}};
  Above at_lowest{row.size, mass, 0, 0};
  float lowest = low;
  const auto weight_of = [&](float logit) {
    float weight;
    double unused;
    row.path.weigh_logits(&logit, 1, row.top, row.inverse_temperature, &weight, &unused);
    return static_cast<double>(weight);
  };
  if (top_k > 0 && top_k < row.size) {
    const Limit limit = find_limit(row, part, low, at_lowest, row.top, static_cast<double>(top_k), count_of, guess_limits(row, low, top_k, 1.0));
    if (limit.logit > low) {  // else there are not so many above it
      cut = {limit.logit, top_k - limit.over.count};
      mass = limit.over.mass + static_cast<double>(cut.num_equal) * weight_of(cut.logit);
      lowest = nextafterf(cut.logit, -INFINITY), at_lowest = limit.with_equal;
    }
  }
  if (top_p < 1.0) {
    const double goal = top_p * mass;
    if (!(goal > 0)) return {row.top, 1};
    if (at_lowest.count <= kFew && part.size > kFew) part = gather(row, part, lowest, row.top, {}, &row.scratch->few);
    const std::vector<float> guesses = part.size < row.size ? std::vector<float>{} : guess_limits(row, lowest, kFew / 4, top_p);
    const Limit limit = find_limit(row, part, lowest, at_lowest, row.top, goal, mass_of, guesses);
    const double weight = weight_of(limit.logit);
    auto num_equal = static_cast<int64_t>((goal - limit.over.mass) / weight);
    while (limit.over.mass + static_cast<double>(num_equal) * weight < goal) ++num_equal;
    while (num_equal > 1 && limit.over.mass + static_cast<double>(num_equal - 1) * weight >= goal) --num_equal;
    cut.num_equal = limit.logit == cut.logit ? std::min(cut.num_equal, num_equal) : num_equal;
    cut.logit = limit.logit;
  }
  return cut;
}

// The first token at which the sum of the weights exceeds `number` of all they sum to.
int64_t invert(const Row& row, double number) {
  double all = 0;
  const int64_t num_blocks = (row.size + kMassBlock - 1) / kMassBlock;
  for (int64_t block = 0; block < num_blocks; ++block) all += row.masses[block];
  const double target = number * all;
  double before = 0;
  int64_t last = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    if (row.masses[block] > 0) last = block;
    if (before + row.masses[block] > target) break;
    before += row.masses[block];
  }
  int64_t token = 0;
  for (int64_t i = last * kMassBlock; i < std::min(row.size, (last + 1) * kMassBlock); ++i) {
    if (row.weights[i] > 0) token = i;
    if (before + row.weights[i] > target) break;
    before += row.weights[i];
  }
  return token;
}

}  // namespace

void check_draw(const BatonDraw& draw, int64_t vocab_size) {
  const bool penalized = draw.repetition_penalty != 1.0f || draw.frequency_penalty != 0 || draw.presence_penalty != 0;
  auto is_inside = [&](uint32_t token) { return token < vocab_size; };
  if (!std::all_of(draw.biased, draw.biased + draw.num_biased, is_inside) ||
      (penalized && !std::all_of(draw.token_ids, draw.token_ids + draw.num_tokens, is_inside)))
    throw std::runtime_error("a draw names a token outside the vocabulary");
}

int64_t draw_token(const Path& path, const float* logits, int64_t vocab_size, const BatonDraw& draw, DrawScratch* scratch) {
  if (is_adjusted(draw)) {
    scratch->adjusted.assign(logits, logits + vocab_size);
    adjust(scratch->adjusted.data(), vocab_size, draw, &scratch->counts);
    logits = scratch->adjusted.data();
  }
  const float top = path.greatest(logits, vocab_size);
  if (draw.inverse_temperature == 0 || top == -INFINITY) return std::find(logits, logits + vocab_size, top) - logits;
  scratch->weights.resize(vocab_size), scratch->masses.resize((vocab_size + kMassBlock - 1) / kMassBlock);
  const Row row{path, logits, vocab_size, top, draw.inverse_temperature, scratch->weights.data(), scratch->masses.data(), scratch};
  const double mass = path.weigh_logits(logits, vocab_size, top, draw.inverse_temperature, row.weights, row.masses);
  if (draw.top_k > 0 || draw.top_p < 1.0 || draw.least_weight > 0) {
    const Cut cut = draw.top_k > 0 || draw.top_p < 1.0 ? cut_to(row, mass, draw.top_k, draw.top_p) : Cut{};
    int64_t surplus = path.keep(logits, row.weights, vocab_size, cut.logit, draw.least_weight, row.masses) - cut.num_equal;
    if (cut.logit == -INFINITY) surplus = 0;
    for (int64_t i = vocab_size; surplus > 0; --surplus) {  // the last of the equal ones go
      do --i;
      while (logits[i] != cut.logit);
      row.masses[i / kMassBlock] -= row.weights[i];
      row.weights[i] = 0;
    }
  }
  const auto position = static_cast<uint32_t>(draw.num_tokens - draw.num_prompt_tokens);
  return invert(row, uniform(draw.seed, draw.choice, position));
}

}  // namespace baton
