#include "embedding.h"

#include <stdexcept>

#include "thread_pool.h"

namespace pelton {

void embed(const EmbeddingTable& table, const int64_t* token_ids, int num_tokens, float* out, ThreadPool& pool) {
    for (int token = 0; token < num_tokens; ++token) {
        if (token_ids[token] < 0 || token_ids[token] >= table.num_rows) {
            throw std::out_of_range("a token id is outside the embedding table");
        }
    }
    pool.run(num_tokens, [&](int token, int) {
        float* to = out + static_cast<int64_t>(token) * table.width;
        table.decode(token_ids[token], to);
        if (table.scale != 1.0f) {
            for (int i = 0; i < table.width; ++i) to[i] *= table.scale;
        }
    });
}

}  // namespace pelton
