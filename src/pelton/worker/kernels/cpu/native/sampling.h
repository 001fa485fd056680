// Choosing the next tokens from logits: edits, temperature, top-k, top-p, min-p, the draw, log-probabilities.
// The same tokens as worker/sampling/reference.py, which is the plain statement of what is meant.
//
// Legend: S rows, V vocabulary, W = ceil(V / 32).
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime.h"

namespace pelton {

// What one request's sampling needs; ids are within the vocabulary.
struct SamplingRow {
    int64_t vocab_size = 0;
    double temperature = 0.0;  // 0: greedy
    int64_t top_k = 0;
    double top_p = 1.0;
    double min_p = 0.0;
    uint64_t seed = 0;
    int64_t min_tokens = 0;
    int num_logprobs = -1;  // -1: none wanted
    float repetition_penalty = 1.0f;
    float presence_penalty = 0.0f;
    float frequency_penalty = 0.0f;
    std::vector<std::pair<int32_t, float>> bias;
    std::vector<uint32_t> allowed;  // [W], or empty
    std::vector<int32_t> banned;
    std::vector<int32_t> stops;  // banned until min_tokens

    // Distinct tokens seen, and how often in the output (0: in the prompt only).
    std::vector<std::pair<int32_t, float>> seen;
    std::unordered_map<int32_t, size_t> seen_at;

    bool has_penalty() const {
        return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
    }
    bool has_edits(int64_t position) const {
        return !bias.empty() || !allowed.empty() || !banned.empty() || !seen.empty() ||
               (position < min_tokens && !stops.empty());
    }
    void add_seen(std::span<const int32_t> token_ids, float count);
};

struct TokenLogprobs {
    double logprob = 0.0;
    int64_t rank = 0;
    std::vector<std::pair<int64_t, double>> top;
};

// In place of a token id.
constexpr int64_t kNotFinite = -1, kAllBanned = -2, kOverflow = -3;

struct SampleTask {
    const SamplingRow* row;
    int64_t position;      // tokens in the output so far
    const uint32_t* mask;  // [W] of a grammar, or null
    int64_t token_id = 0;  // the answer
    TokenLogprobs logprobs = {};
};

// Rows are spread over the runtime's threads. One operation at a time, as everything of a runtime.
class Sampler {
public:
    Sampler(Runtime& runtime, int64_t vocab_size) : runtime_(runtime), vocab_size_(vocab_size) {}

    int64_t vocab_size() const { return vocab_size_; }

    // Fills in the answers; logits [S, V] may be edited.
    void sample(float* logits, std::span<SampleTask> tasks);

    // Of raw logits [S, V] and one token each. False where a row is not finite.
    bool token_logprobs(const float* logits, std::span<const int64_t> token_ids, int num_top,
                        std::span<TokenLogprobs> out);

private:
    Runtime& runtime_;
    int64_t vocab_size_;
    Buffer scratch_;
};

}  // namespace pelton
