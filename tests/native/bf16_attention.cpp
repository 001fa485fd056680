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

template <class Type>
std::vector<float> attend(const AttentionShape& shape, const std::vector<float>& query, int seq_len,
                          const std::vector<int64_t>& table, const std::vector<uint16_t>& keys,
                          const std::vector<uint16_t>& values, int chunk) {
    const int64_t row = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
    const int num_tokens = static_cast<int>(query.size() / row);
    std::vector<float> out(query.size());
    auto* scratch = static_cast<float*>(std::aligned_alloc(64, (attention_scratch_floats(shape) * 4 + 63) / 64 * 64));
    for (int first = 0; first < num_tokens; first += chunk) {
        const int count = std::min(chunk, num_tokens - first);
        const AttentionRequest request = {query.data() + first * row, row,   out.data() + first * row, count,
                                          seq_len - num_tokens + first + count, table.data()};
        for (int head = 0; head < shape.num_kv_heads; ++head) {
            avx512::HeadTile<Type>(shape, request, keys.data(), values.data(), head, 0, count, scratch).run();
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
    for (int dim : {1, 2, 15, 33, 40, 64, 80, 127, 256}) {
        for (int window : {0, 1, 50}) {
            for (float softcap : {0.0f, 5.0f}) {
                const int num_kv_heads = 2, seq_len = 150, num_tokens = 32, block_size = 7;
                const AttentionShape shape = {6, num_kv_heads, dim, block_size, window, 1 / std::sqrt(float(dim)),
                                              softcap, KVType::BF16};
                const int num_blocks = (seq_len + block_size - 1) / block_size;
                std::vector<int64_t> table(num_blocks);
                for (int i = 0; i < num_blocks; ++i) table[i] = num_blocks - 1 - i;
                std::vector<uint16_t> keys(num_blocks * block_size * num_kv_heads * dim), values(keys.size());
                for (auto& key : keys) key = float_to_bfloat16(normal(generator));
                for (auto& value : values) value = float_to_bfloat16(normal(generator));
                std::vector<float> query(static_cast<size_t>(num_tokens) * shape.num_heads * dim);
                for (auto& value : query) value = normal(generator);
                const auto wide = attend<avx512::WideBF16>(shape, query, seq_len, table, keys, values, num_tokens);
                const auto pairs = attend<avx512::BF16>(shape, query, seq_len, table, keys, values, num_tokens);
                for (size_t i = 0; i < wide.size(); ++i) {
                    const float error = std::fabs(wide[i] - pairs[i]);
                    if (!(error < 0.05f)) return false;
                    worst = std::max(worst, error);
                }
                for (int chunk : {1, 5, 31}) {  // law 3
                    if (attend<avx512::BF16>(shape, query, seq_len, table, keys, values, chunk) != pairs) return false;
                }
            }
        }
    }
    std::printf("bfloat16 pairs: clean, %.4f off at most\n", static_cast<double>(worst));
    return true;
}

}  // namespace pelton
