#include "sampling.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "sampling_weight.h"

namespace pelton {

namespace {

constexpr int kNumBins = 512;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

// A token in order of likelihood: keys ascend from the most likely, equal values in order of id.
struct Candidate {
    uint64_t key;
    int64_t weight;

    int64_t id() const { return static_cast<uint32_t>(key); }
};

uint64_t key_of(float value, int64_t id) {
    int32_t bits;
    value += 0.0f;  // -0.0 equals 0.0
    std::memcpy(&bits, &value, 4);
    const int32_t ascending = bits ^ ((bits >> 31) & 0x7fffffff);  // orders as the floats do
    return static_cast<uint64_t>(static_cast<uint32_t>(~ascending) ^ 0x80000000u) << 32 | static_cast<uint64_t>(id);
}

bool likelier(const Candidate& a, const Candidate& b) { return a.key < b.key; }

// SplitMix64 as in worker/sampling/uniform.py: 53 random bits.
uint64_t mix(uint64_t value) {
    value += 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

uint64_t random_bits(uint64_t seed, int64_t position) {
    return mix(mix(seed) + 0x9E3779B97F4A7C15u * static_cast<uint64_t>(position + 1)) >> 11;
}

int64_t drawn_weight(uint64_t random, int64_t total) {
    return static_cast<int64_t>(static_cast<unsigned __int128>(random) * static_cast<uint64_t>(total) >> 53);
}

// The last of the first candidates in order that measure `wanted` together. Halves that cannot hold it are
// never sorted; the order is lost.
template <typename Measure>
const Candidate& last_of_head(Candidate* candidates, int64_t count, int64_t wanted, const Measure& measure) {
    int64_t low = 0, high = count;
    while (high - low > 32) {
        const int64_t middle = low + (high - low) / 2;
        std::nth_element(candidates + low, candidates + middle, candidates + high, likelier);
        int64_t sum = 0;
        for (int64_t i = low; i < middle; ++i) sum += measure(candidates[i]);
        if (sum >= wanted) {
            high = middle;
        } else {
            wanted -= sum;
            low = middle;
        }
    }
    std::sort(candidates + low, candidates + high, likelier);
    while (low + 1 < high && (wanted -= measure(candidates[low])) > 0) ++low;
    return candidates[low];
}

// One thread's memory for rows of V logits.
struct Scratch {
    Candidate* tokens;  // [V]
    Candidate* edge;    // [V]
    float* row;         // [V]
    int64_t* weights;   // [blocks]
    float* maxima;      // [blocks]
    float* selected;    // [blocks]

    static int64_t num_blocks(int64_t size) { return (size + kSampleBlock - 1) / kSampleBlock; }

    static size_t num_bytes(int64_t size) {
        const auto blocks = static_cast<size_t>(num_blocks(size));
        return blocks * (kSampleBlock * (2 * sizeof(Candidate) + sizeof(float)) + sizeof(int64_t) + 2 * sizeof(float));
    }

    Scratch(void* memory, int64_t size, int thread) {
        const auto blocks = static_cast<size_t>(num_blocks(size));
        tokens = reinterpret_cast<Candidate*>(static_cast<uint8_t*>(memory) + thread * num_bytes(size));
        edge = tokens + blocks * kSampleBlock;
        row = reinterpret_cast<float*>(edge + blocks * kSampleBlock);
        weights = reinterpret_cast<int64_t*>(row + blocks * kSampleBlock);
        maxima = reinterpret_cast<float*>(weights + blocks);
        selected = maxima + blocks;
    }
};

// A row of finite greatest value with the maxima of its blocks.
class Chooser {
public:
    Chooser(const KernelTable& kernels, const float* x, int64_t size, float greatest, Scratch& scratch)
        : kernels_(kernels), x_(x), size_(size), greatest_(greatest), scratch_(scratch) {}

    int64_t argmax() const {
        const int64_t block = std::find(scratch_.maxima, scratch_.maxima + num_blocks(), greatest_) - scratch_.maxima;
        return std::find(x_ + block * kSampleBlock, x_ + size_, greatest_) - x_;
    }

    int64_t draw(const SamplingRow& row, int64_t position) {
        temperature_ = std::max(row.temperature, 1e-30);
        inverse_ = static_cast<float>(1.0 / temperature_);
        const uint64_t random = random_bits(row.seed, position);
        int64_t count;
        if (row.top_k > 0 && row.top_k < size_) {
            count = take_top(row.top_k);
            weigh(count);
            if (row.top_p < 1.0) count = keep_nucleus(count, head_weight(row.top_p, sum_of(count)));
        } else if (row.top_p < 1.0) {
            count = take_nucleus(row.top_p);
        } else if (row.min_p > 0.0) {
            count = collect(logit_of(row.min_p));
            weigh(count);
        } else {
            return draw_from_all(random);
        }
        if (row.min_p > 0.0) {
            const auto least = static_cast<int64_t>(std::ceil(row.min_p * static_cast<double>(kWeightOne)));
            count = keep(count, [&](const Candidate& token) { return token.weight >= least; });
        }
        int64_t left = drawn_weight(random, sum_of(count));
        const Candidate* token = scratch_.tokens;
        while ((left -= token->weight) >= 0) ++token;
        return token->id();
    }

    // The num_top most likely to `out`, as log-probabilities; -inf is left out.
    void logprobs(int64_t token_id, int num_top, TokenLogprobs& out) {
        kernels_.block_weights(x_, size_, greatest_, 1.0f, scratch_.weights);
        const double total = static_cast<double>(sum_of_blocks());
        const double normalizer = static_cast<double>(greatest_) + std::log(total / static_cast<double>(kWeightOne));
        out.logprob = static_cast<double>(x_[token_id]) - normalizer;
        out.rank = kernels_.num_above(x_, size_, token_id) + 1;
        const int64_t count = num_top > 0 ? take_top(num_top) : 0;
        std::sort(scratch_.tokens, scratch_.tokens + count, likelier);
        out.top.resize(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) {
            const int64_t id = scratch_.tokens[i].id();
            out.top[i] = {id, static_cast<double>(x_[id]) - normalizer};
        }
    }

private:
    int64_t num_blocks() const { return Scratch::num_blocks(size_); }

    static int64_t head_weight(double top_p, int64_t total) {
        return std::min(static_cast<int64_t>(std::ceil(top_p * static_cast<double>(total))), total);
    }

    int64_t sum_of(int64_t count) const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += scratch_.tokens[i].weight;
        return sum;
    }

    int64_t sum_of_blocks() const {
        int64_t sum = 0;
        for (int64_t block = 0; block < num_blocks(); ++block) sum += scratch_.weights[block];
        return sum;
    }

    void weigh(int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            Candidate& token = scratch_.tokens[i];
            token.weight = weight_of(x_[token.id()], greatest_, inverse_);
        }
    }

    // A logit whose weight is at most `weight` of the greatest's: a shade too low, so that rounding is left to
    // the comparison of weights.
    double logit_of(double weight) const {
        return greatest_ + temperature_ * (std::log(std::max(weight, 1e-13)) - 1e-3);
    }

    // Candidates of at least `least_logit` in order of id; -inf is left out. Blocks below it are not read.
    int64_t collect(double least_logit) {
        const auto least = static_cast<float>(std::max(least_logit, -double{std::numeric_limits<float>::max()}));
        int64_t count = 0;
        for (int64_t block = 0; block < num_blocks(); ++block) {
            if (scratch_.maxima[block] < least) continue;
            const int64_t end = std::min(size_, (block + 1) * kSampleBlock);
            for (int64_t i = block * kSampleBlock; i < end; ++i) {
                scratch_.tokens[count].key = key_of(x_[i], i);
                count += x_[i] >= least;
            }
        }
        return count;
    }

    template <typename Condition>
    int64_t keep(int64_t count, const Condition& condition) {
        int64_t num_kept = 0;
        for (int64_t i = 0; i < count; ++i) {
            const Candidate token = scratch_.tokens[i];
            scratch_.tokens[num_kept] = token;
            num_kept += condition(token);
        }
        return num_kept;
    }

    // Keeps the most likely candidates that measure `wanted` together, in their order. They are dealt into
    // kNumBins by logit, and only the bin where the head ends is ordered.
    template <typename Measure>
    int64_t keep_head(int64_t count, int64_t wanted, const Measure& measure) {
        int64_t num_edge = count;
        if (count <= 4 * kNumBins) {
            std::copy_n(scratch_.tokens, count, scratch_.edge);
        } else {
            double lowest = greatest_;
            for (int64_t i = 0; i < count; ++i) lowest = std::min(lowest, double{x_[scratch_.tokens[i].id()]});
            const double scale = lowest < greatest_ ? (kNumBins - 1) / (greatest_ - lowest) : 0.0;
            const auto bin_of = [&](const Candidate& token) {
                return static_cast<int>((greatest_ - double{x_[token.id()]}) * scale);
            };
            int64_t bins[kNumBins] = {};
            for (int64_t i = 0; i < count; ++i) bins[bin_of(scratch_.tokens[i])] += measure(scratch_.tokens[i]);
            int last = 0;
            while (last + 1 < kNumBins && bins[last] < wanted) wanted -= bins[last++];
            num_edge = 0;
            for (int64_t i = 0; i < count; ++i) {
                scratch_.edge[num_edge] = scratch_.tokens[i];
                num_edge += bin_of(scratch_.tokens[i]) == last;
            }
        }
        const uint64_t last_key = last_of_head(scratch_.edge, num_edge, wanted, measure).key;
        return keep(count, [&](const Candidate& token) { return token.key <= last_key; });
    }

    // The `wanted` most likely. The wanted-th greatest block bounds the wanted-th token from below.
    int64_t take_top(int64_t wanted) {
        double least = kLowest;
        if (wanted <= num_blocks() / 2) {
            std::copy_n(scratch_.maxima, num_blocks(), scratch_.selected);
            float* const bound = scratch_.selected + wanted - 1;
            std::nth_element(scratch_.selected, bound, scratch_.selected + num_blocks(), std::greater<float>());
            least = *bound;
        }
        const int64_t count = collect(least);
        return count <= wanted ? count : keep_head(count, wanted, [](const Candidate&) { return int64_t{1}; });
    }

    int64_t keep_nucleus(int64_t count, int64_t wanted) {
        return keep_head(count, wanted, [](const Candidate& token) { return token.weight; });
    }

    // As a rule few tokens hold the mass: these are tried first. The other bound is safe: all tokens below it
    // together weigh no more than what top-p leaves out.
    int64_t take_nucleus(double top_p) {
        kernels_.block_weights(x_, size_, greatest_, inverse_, scratch_.weights);
        const int64_t total = sum_of_blocks(), wanted = head_weight(top_p, total);
        const double least = static_cast<double>(total - wanted) / static_cast<double>(size_ * kWeightOne);
        int64_t count = 0;
        for (double weight : {std::exp(-4.0), least}) {
            count = collect(logit_of(weight));
            weigh(count);
            if (sum_of(count) >= wanted) break;
        }
        return keep_nucleus(count, wanted);
    }

    int64_t draw_from_all(uint64_t random) {
        kernels_.block_weights(x_, size_, greatest_, inverse_, scratch_.weights);
        int64_t left = drawn_weight(random, sum_of_blocks());
        int64_t block = 0;
        while (left >= scratch_.weights[block]) left -= scratch_.weights[block++];
        int64_t id = block * kSampleBlock;
        while ((left -= weight_of(x_[id], greatest_, inverse_)) >= 0) ++id;
        return id;
    }

    const KernelTable& kernels_;
    const float* x_;
    int64_t size_;
    float greatest_;
    Scratch& scratch_;
    double temperature_ = 1.0;
    float inverse_ = 1.0f;
};

// In the order that `SamplingParams` documents.
void edit(const KernelTable& kernels, const SampleTask& task, float* x) {
    const SamplingRow& row = *task.row;
    for (const auto& [id, bias] : row.bias) x[id] += bias;
    if (!row.allowed.empty()) kernels.mask_row(x, row.vocab_size, row.allowed.data());
    if (task.mask != nullptr) kernels.mask_row(x, row.vocab_size, task.mask);
    for (int32_t id : row.banned) x[id] = kLowest;
    if (task.position < row.min_tokens) {
        for (int32_t id : row.stops) x[id] = kLowest;
    }
    for (const auto& [id, count] : row.seen) {
        float value = x[id];
        if (row.repetition_penalty != 1.0f) {
            value = value > 0.0f ? value / row.repetition_penalty : value * row.repetition_penalty;
        }
        value -= row.frequency_penalty * count;
        value -= row.presence_penalty * (count > 0.0f ? 1.0f : 0.0f);
        x[id] = value;
    }
}

void sample_row(const KernelTable& kernels, float* logits, Scratch& scratch, SampleTask& task) {
    const SamplingRow& row = *task.row;
    const int64_t size = row.vocab_size;
    const float greatest = kernels.block_maxima(logits, size, scratch.maxima);
    if (!std::isfinite(greatest)) {
        task.token_id = kNotFinite;
        return;
    }
    float* x = logits;
    float greatest_left = greatest;
    const bool is_edited = task.mask != nullptr || row.has_edits(task.position);
    if (is_edited) {
        if (row.num_logprobs >= 0) {  // which are of the raw logits
            x = scratch.row;
            std::copy_n(logits, size, x);
        }
        edit(kernels, task, x);
        greatest_left = kernels.block_maxima(x, size, scratch.maxima);
        if (!std::isfinite(greatest_left)) {
            task.token_id = greatest_left == kLowest ? kAllBanned : kOverflow;
            return;
        }
    }
    Chooser chooser(kernels, x, size, greatest_left, scratch);
    task.token_id = row.temperature == 0.0 ? chooser.argmax() : chooser.draw(row, task.position);
    if (row.num_logprobs >= 0) {
        if (is_edited) kernels.block_maxima(logits, size, scratch.maxima);
        Chooser(kernels, logits, size, greatest, scratch).logprobs(task.token_id, row.num_logprobs, task.logprobs);
    }
}

}  // namespace

void SamplingRow::add_seen(std::span<const int32_t> token_ids, float count) {
    for (int32_t id : token_ids) {
        const auto [place, is_new] = seen_at.try_emplace(id, seen.size());
        if (is_new) seen.emplace_back(id, 0.0f);
        seen[place->second].second += count;
    }
}

void Sampler::sample(float* logits, std::span<SampleTask> tasks) {
    // Here, where memory may run out: a thread of the pool must not throw.
    for (auto& task : tasks) task.logprobs.top.reserve(static_cast<size_t>(std::max(task.row->num_logprobs, 0)));
    void* const memory = scratch_.reserve(Scratch::num_bytes(vocab_size_) * runtime_.pool().num_threads());
    runtime_.pool().run(static_cast<int>(tasks.size()), [&](int index, int thread) {
        Scratch scratch(memory, vocab_size_, thread);
        sample_row(runtime_.kernels(), logits + index * vocab_size_, scratch, tasks[index]);
    });
}

bool Sampler::token_logprobs(const float* logits, std::span<const int64_t> token_ids, int num_top,
                             std::span<TokenLogprobs> out) {
    for (auto& logprobs : out) logprobs.top.reserve(static_cast<size_t>(num_top));
    void* const memory = scratch_.reserve(Scratch::num_bytes(vocab_size_) * runtime_.pool().num_threads());
    std::atomic<bool> is_finite{true};
    runtime_.pool().run(static_cast<int>(token_ids.size()), [&](int index, int thread) {
        Scratch scratch(memory, vocab_size_, thread);
        const float* x = logits + index * vocab_size_;
        const float greatest = runtime_.kernels().block_maxima(x, vocab_size_, scratch.maxima);
        if (!std::isfinite(greatest)) {
            is_finite.store(false, std::memory_order_relaxed);
            return;
        }
        Chooser(runtime_.kernels(), x, vocab_size_, greatest, scratch).logprobs(token_ids[index], num_top, out[index]);
    });
    return is_finite.load();
}

}  // namespace pelton
