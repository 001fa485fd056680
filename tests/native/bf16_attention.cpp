// Attention by products of bfloat16 pairs, against float32 products over the same cache. A processor uses
// one of the two, so that from Python only one is ever tested.

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "attention_avx512.h"
#include "float16.h"

namespace pelton {

namespace {

struct Caches {
    std::vector<int64_t> table;
    std::vector<uint16_t> keys, values;
};

template <class Words>
std::vector<float> attend(const AttentionShape& shape, const std::vector<float>& query, int seq_len, const Caches& caches,
                          int tokens_at_once) {
    const int64_t row = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
    const int num_tokens = static_cast<int>(query.size() / row), group = shape.num_heads / shape.num_kv_heads;
    std::vector<float> out(query.size());
    const int64_t num_floats = avx512::HeadRows<Words>::scratch_floats(shape.head_dim, tokens_at_once * group);
    auto* scratch = static_cast<float*>(std::aligned_alloc(64, (num_floats * 4 + 63) / 64 * 64));
    for (int first = 0; first < num_tokens; first += tokens_at_once) {
        const int end = std::min(first + tokens_at_once, num_tokens);
        for (int head = 0; head < shape.num_kv_heads; ++head) {
            std::vector<AttentionColumn> columns;
            for (int token = first; token < end; ++token) {
                for (int i = 0; i < group; ++i) {
                    const int64_t at = token * row + static_cast<int64_t>(head * group + i) * shape.head_dim;
                    columns.push_back({query.data() + at, out.data() + at, seq_len - num_tokens + token});
                }
            }
            const ColumnRun run = {columns.data(), static_cast<int>(columns.size()), seq_len - num_tokens + end, caches.table.data()};
            avx512::HeadRows<Words>(shape, run, caches.keys.data(), caches.values.data(), head, scratch).run();
        }
    }
    std::free(scratch);
    return out;
}

}  // namespace

bool check_bf16_attention() {
    std::mt19937 generator(0);
    std::normal_distribution<float> normal;
    float worst = 0.0f;
    for (int dim : {16, 48, 64, 80, 256}) {
        for (int window : {0, 1, 50, 300}) {
            for (float softcap : {0.0f, 5.0f}) {
                const int num_kv_heads = 2, seq_len = 550, num_tokens = 32, block_size = 16;
                const AttentionShape shape = {6, num_kv_heads, dim, block_size, window, 1 / std::sqrt(float(dim)),
                                              softcap, KVType::BF16};
                const int num_blocks = (seq_len + block_size - 1) / block_size;
                Caches caches;
                for (int i = 0; i < num_blocks; ++i) caches.table.push_back(num_blocks - 1 - i);
                caches.keys.resize(static_cast<size_t>(num_blocks) * block_size * num_kv_heads * dim);
                caches.values.resize(caches.keys.size());
                for (auto& key : caches.keys) key = float_to_bfloat16(normal(generator));
                for (auto& value : caches.values) value = float_to_bfloat16(normal(generator));
                std::vector<float> query(static_cast<size_t>(num_tokens) * shape.num_heads * dim);
                for (auto& value : query) value = normal(generator);
                const auto wide = attend<avx512::WideWords>(shape, query, seq_len, caches, num_tokens);
                const auto pairs = attend<avx512::PairWords>(shape, query, seq_len, caches, num_tokens);
                for (size_t i = 0; i < wide.size(); ++i) {
                    const float error = std::fabs(wide[i] - pairs[i]);
                    if (!(error < 0.05f)) return false;
                    worst = std::max(worst, error);
                }
                for (int at_once : {1, 5, 31}) {  // law 3
                    if (attend<avx512::PairWords>(shape, query, seq_len, caches, at_once) != pairs) return false;
                }
            }
        }
    }
    std::printf("bfloat16 pairs: clean, %.4f off at most\n", static_cast<double>(worst));
    return true;
}

}  // namespace pelton
