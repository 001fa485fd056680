// Attention of one key-value head over a tile of one request's tokens, with AVX-512.
//
// Online softmax (Milakov and Gimelshein, arXiv:1805.02867) over tiles of kTilePositions positions.
// With bfloat16 caches, products are bfloat16 pairs summed in float32; with float32 caches, float32.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "activation_avx512.h"
#include "attention.h"

namespace pelton::avx512 {

// A "word" is what one 32-bit lane multiplies: a float32, or two bfloat16. Element is what the tile's
// queries and probabilities are made of, Cached what the cache holds.
struct F32 {
    using Element = float;
    using Cached = float;
    static constexpr int kPerWord = 1;
    static __m512i load_words(const uint8_t* row, int word, __mmask16 mask) {
        return _mm512_maskz_loadu_epi32(mask, row + 4 * word);
    }
    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static void store(Element* to, __m512 values) { _mm512_storeu_ps(to, values); }
};

// bfloat16 in the cache, float32 products: for processors whose bfloat16 products are the slower ones.
struct WideBF16 : F32 {
    using Cached = uint16_t;
    static __m512i load_words(const uint8_t* row, int word, __mmask16 mask) {
        return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + 2 * word)), 16);
    }
};

struct BF16 {
    using Element = uint16_t;
    using Cached = uint16_t;
    static constexpr int kPerWord = 2;
    static __m512i load_words(const uint8_t* row, int word, __mmask16 mask) {
        return _mm512_maskz_loadu_epi32(mask, row + 4 * word);
    }
    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static void store(Element* to, __m512 values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }
};

// 16 x 16 words in place.
inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Words [first, first + num_columns) of 16 rows (null: zeros) to their transpose, to[j * kTilePositions + i].
template <class Type>
inline void transpose_16x16(const uint8_t* const rows[16], int first, uint32_t* to, int num_columns) {
    const auto columns = static_cast<__mmask16>((1u << num_columns) - 1);
    __m512i r[16];
    for (int i = 0; i < 16; ++i) {
        r[i] = rows[i] != nullptr ? Type::load_words(rows[i], first, columns) : _mm512_setzero_si512();
    }
    transpose(r);
    for (int j = 0; j < num_columns; ++j) _mm512_storeu_si512(to + j * kTilePositions, r[j]);
}

// Where the parts of the scratch lie; all in 32-bit words.
struct Scratch {
    uint32_t* keys;    // [D / kPerWord][kTilePositions]
    uint32_t* values;  // [kTilePositions / kPerWord][D16]
    uint32_t* queries; // [rows][D / kPerWord], scaled
    float* scores;     // [rows][kTilePositions]; then probabilities as elements
    float* result;     // [rows][D16]
    float* maxima;
    float* sums;
};

template <class Type>
class HeadTile {
    using Element = typename Type::Element;
    static constexpr int kPerWord = Type::kPerWord;

public:
    HeadTile(const AttentionShape& shape, const AttentionRequest& request, const void* keys, const void* values,
             int kv_head, int first_token, int num_tokens, float* scratch)
        : shape_(shape),
          request_(request),
          keys_(static_cast<const uint8_t*>(keys)),
          values_(static_cast<const uint8_t*>(values)),
          kv_head_(kv_head),
          first_token_(first_token),
          group_(shape.num_heads / shape.num_kv_heads),
          num_rows_(num_tokens * group_),
          first_position_(request.seq_len - request.num_tokens + first_token),
          last_position_(first_position_ + num_tokens - 1),
          dim16_((shape.head_dim + 15) / 16 * 16),
          num_words_((shape.head_dim + kPerWord - 1) / kPerWord) {
        const auto take = [&scratch](int64_t count) {
            float* part = scratch;
            scratch += (count + 15) / 16 * 16;
            return part;
        };
        s_.keys = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(dim16_) * kTilePositions));
        s_.values = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(dim16_) * kTilePositions));
        s_.queries = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(num_rows_) * dim16_));
        s_.scores = take(static_cast<int64_t>(num_rows_) * kTilePositions);
        s_.result = take(static_cast<int64_t>(num_rows_) * dim16_);
        s_.maxima = take(num_rows_);
        s_.sums = take(num_rows_);
    }

    void run() {
        load_queries();
        std::fill_n(s_.result, static_cast<int64_t>(num_rows_) * dim16_, 0.0f);
        std::fill_n(s_.maxima, num_rows_, -std::numeric_limits<float>::infinity());
        std::fill_n(s_.sums, num_rows_, 0.0f);
        const int first = shape_.sliding_window > 0 ? std::max(0, first_position_ - shape_.sliding_window + 1) : 0;
        for (int start = first / kTilePositions * kTilePositions; start <= last_position_; start += kTilePositions) {
            const int end = std::min(start + kTilePositions, last_position_ + 1);
            load_tile(std::max(start, first), end, start);
            score_rows();
            for (int row = 0; row < num_rows_; ++row) soften(row, start);
            add_values();
        }
        store();
    }

private:
    int64_t row_offset(int row) const {
        return (first_token_ + row / group_) * request_.ld_query +
               static_cast<int64_t>(kv_head_ * group_ + row % group_) * shape_.head_dim;
    }

    void load_queries() {
        const __m512 scale = _mm512_set1_ps(shape_.scale);
        for (int row = 0; row < num_rows_; ++row) {
            const float* from = request_.query + row_offset(row);
            auto* to = reinterpret_cast<Element*>(s_.queries + static_cast<int64_t>(row) * dim16_);
            for (int d = 0; d < dim16_; d += 16) {
                const __mmask16 mask = tail_mask(d);
                Type::store(to + d, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + d), scale));
            }
        }
    }

    __mmask16 tail_mask(int d) const {
        return static_cast<__mmask16>((1u << std::clamp(shape_.head_dim - d, 0, 16)) - 1);
    }

    // Element rows of positions [from, to) as keys by column and values by pair; the rest of the tile is 0.
    void load_tile(int from, int to, int start) {
        const int64_t head_bytes = shape_.head_dim * static_cast<int64_t>(sizeof(typename Type::Cached));
        const int64_t token_bytes = shape_.num_kv_heads * head_bytes;
        int64_t offsets[kTilePositions];
        for (int i = 0; i < kTilePositions; ++i) {
            const int position = start + i;
            if (position < from || position >= to) {
                offsets[i] = -1;
                continue;
            }
            const int64_t block = request_.block_table[position / shape_.block_size];
            offsets[i] = (block * shape_.block_size + position % shape_.block_size) * token_bytes + kv_head_ * head_bytes;
        }
        for (int i = 0; i < kTilePositions; i += 16) {
            const uint8_t* rows[16];
            for (int j = 0; j < 16; ++j) rows[j] = offsets[i + j] < 0 ? nullptr : keys_ + offsets[i + j];
            for (int word = 0; word < num_words_; word += 16) {
                const int count = std::min(16, num_words_ - word);
                if (kPerWord == 2 && 2 * (word + count) > shape_.head_dim) {
                    load_odd_keys(rows, word, i);
                    continue;
                }
                transpose_16x16<Type>(rows, word, s_.keys + word * kTilePositions + i, count);
            }
        }
        for (int i = 0; i < kTilePositions; i += kPerWord) load_values(offsets, i);
    }

    // An odd head size ends in half a word.
    void load_odd_keys(const uint8_t* const rows[16], int first_word, int column) {
        for (int word = first_word; word < num_words_; ++word) {
            for (int j = 0; j < 16; ++j) {
                uint32_t value = 0;
                const int bytes = std::min(4, 2 * shape_.head_dim - 4 * word);
                if (rows[j] != nullptr) std::memcpy(&value, rows[j] + 4 * word, bytes);
                s_.keys[word * kTilePositions + column + j] = value;
            }
        }
    }

    void load_values(const int64_t* offsets, int position) {
        uint32_t* to = s_.values + static_cast<int64_t>(position / kPerWord) * dim16_;
        for (int d = 0; d < dim16_; d += 16) {
            const __mmask16 mask = tail_mask(d);
            if constexpr (kPerWord == 1) {
                const __m512i row = offsets[position] < 0
                                        ? _mm512_setzero_si512()
                                        : Type::load_words(values_ + offsets[position], d, mask);
                _mm512_storeu_si512(to + d, row);
            } else {
                const __m512i even = load_halves(offsets[position], d, mask);
                const __m512i odd = load_halves(offsets[position + 1], d, mask);
                _mm512_storeu_si512(to + d, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
        }
    }

    __m512i load_halves(int64_t offset, int d, __mmask16 mask) const {
        if (offset < 0) return _mm512_setzero_si512();
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values_ + offset + 2 * d));
    }

    template <int kRows>
    void score_tile(int row) {
        __m512 sum[kRows][4];
        for (int r = 0; r < kRows; ++r) {
            for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
        }
        const uint32_t* query = s_.queries + static_cast<int64_t>(row) * query_stride();
        for (int word = 0; word < num_words_; ++word) {
            __m512i key[4];
            for (int j = 0; j < 4; ++j) key[j] = _mm512_loadu_si512(s_.keys + word * kTilePositions + 16 * j);
            for (int r = 0; r < kRows; ++r) {
                const __m512i q = _mm512_set1_epi32(static_cast<int>(query[r * query_stride() + word]));
                for (int j = 0; j < 4; ++j) sum[r][j] = Type::multiply_add(sum[r][j], q, key[j]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int j = 0; j < 4; ++j) {
                _mm512_storeu_ps(s_.scores + static_cast<int64_t>(row + r) * kTilePositions + 16 * j, sum[r][j]);
            }
        }
    }

    int64_t query_stride() const { return dim16_; }

    void score_rows() {
        for_each_tile([this]<int kRows>(int row) { score_tile<kRows>(row); });
    }

    // Tiles of nearly equal height, 6 rows at most: 7 rows are 4 + 3, not 6 + 1.
    template <class Tile>
    void for_each_tile(const Tile& tile) {
        const int num_tiles = (num_rows_ + 5) / 6;
        for (int i = 0; i < num_tiles; ++i) {
            const int row = num_rows_ * i / num_tiles;
            switch (num_rows_ * (i + 1) / num_tiles - row) {
                case 6: tile.template operator()<6>(row); break;
                case 5: tile.template operator()<5>(row); break;
                case 4: tile.template operator()<4>(row); break;
                case 3: tile.template operator()<3>(row); break;
                case 2: tile.template operator()<2>(row); break;
                case 1: tile.template operator()<1>(row); break;
            }
        }
    }

    // Scores to probabilities relative to the running maximum; rescales the row's sums where that grows.
    void soften(int row, int start) {
        const int position = first_position_ + row / group_;
        const int first = shape_.sliding_window > 0 ? position - shape_.sliding_window + 1 : 0;
        float* scores = s_.scores + static_cast<int64_t>(row) * kTilePositions;
        const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 score[4];
        __m512 largest = hidden;
        for (int j = 0; j < 4; ++j) {
            score[j] = _mm512_loadu_ps(scores + 16 * j);
            if (shape_.softcap > 0.0f) {
                const __m512 cap = _mm512_set1_ps(shape_.softcap);
                score[j] = _mm512_mul_ps(tanh_of(_mm512_div_ps(score[j], cap)), cap);
            }
            const int base = start + 16 * j;
            const uint32_t below = (1u << std::clamp(position - base + 1, 0, 16)) - 1;
            const uint32_t before = (1u << std::clamp(first - base, 0, 16)) - 1;
            score[j] = _mm512_mask_mov_ps(hidden, static_cast<__mmask16>(below & ~before), score[j]);
            largest = _mm512_max_ps(largest, score[j]);
        }
        const float old_maximum = s_.maxima[row];
        const float maximum = std::max(old_maximum, _mm512_reduce_max_ps(largest));
        const float shift = maximum == -std::numeric_limits<float>::infinity() ? 0.0f : maximum;
        __m512 sum = _mm512_setzero_ps();
        auto* probabilities = reinterpret_cast<Element*>(scores);
        for (int j = 0; j < 4; ++j) {
            const __m512 p = exp_negative(_mm512_sub_ps(score[j], _mm512_set1_ps(shift)));
            sum = _mm512_add_ps(sum, p);
            Type::store(probabilities + 16 * j, p);
        }
        const float tile_sum = _mm512_reduce_add_ps(sum);
        if (maximum > old_maximum) {
            s_.maxima[row] = maximum;
            const __m512 factor = exp_negative(_mm512_set1_ps(old_maximum - maximum));
            s_.sums[row] = s_.sums[row] * _mm512_cvtss_f32(factor) + tile_sum;
            float* result = s_.result + static_cast<int64_t>(row) * dim16_;
            for (int d = 0; d < dim16_; d += 16) {
                _mm512_storeu_ps(result + d, _mm512_mul_ps(_mm512_loadu_ps(result + d), factor));
            }
        } else {
            s_.sums[row] += tile_sum;
        }
    }

    template <int kRows>
    void add_tile(int row, int d) {
        float* result = s_.result + static_cast<int64_t>(row) * dim16_ + d;
        const int num_vectors = std::min(4, (dim16_ - d) / 16);
        if (num_vectors == 4) {
            __m512 sum[kRows][4];
            for (int r = 0; r < kRows; ++r) {
                for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_loadu_ps(result + r * dim16_ + 16 * j);
            }
            for (int i = 0; i < kTilePositions / kPerWord; ++i) {
                __m512i value[4];
                for (int j = 0; j < 4; ++j) {
                    value[j] = _mm512_loadu_si512(s_.values + static_cast<int64_t>(i) * dim16_ + d + 16 * j);
                }
                for (int r = 0; r < kRows; ++r) {
                    const __m512i p = probability(row + r, i);
                    for (int j = 0; j < 4; ++j) sum[r][j] = Type::multiply_add(sum[r][j], p, value[j]);
                }
            }
            for (int r = 0; r < kRows; ++r) {
                for (int j = 0; j < 4; ++j) _mm512_storeu_ps(result + r * dim16_ + 16 * j, sum[r][j]);
            }
            return;
        }
        for (int j = 0; j < num_vectors; ++j) {
            for (int r = 0; r < kRows; ++r) {
                __m512 sum = _mm512_loadu_ps(result + r * dim16_ + 16 * j);
                for (int i = 0; i < kTilePositions / kPerWord; ++i) {
                    const __m512i value = _mm512_loadu_si512(s_.values + static_cast<int64_t>(i) * dim16_ + d + 16 * j);
                    sum = Type::multiply_add(sum, probability(row + r, i), value);
                }
                _mm512_storeu_ps(result + r * dim16_ + 16 * j, sum);
            }
        }
    }

    __m512i probability(int row, int word) const {
        const auto* words = reinterpret_cast<const int*>(s_.scores + static_cast<int64_t>(row) * kTilePositions);
        return _mm512_set1_epi32(words[word]);
    }

    void add_values() {
        for (int d = 0; d < dim16_; d += 64) {
            for_each_tile([this, d]<int kRows>(int row) { add_tile<kRows>(row, d); });
        }
    }

    void store() {
        const int64_t out_stride = static_cast<int64_t>(shape_.num_heads) * shape_.head_dim;
        for (int row = 0; row < num_rows_; ++row) {
            const __m512 inverse = _mm512_set1_ps(1.0f / s_.sums[row]);
            float* to = request_.out + (first_token_ + row / group_) * out_stride +
                        static_cast<int64_t>(kv_head_ * group_ + row % group_) * shape_.head_dim;
            for (int d = 0; d < dim16_; d += 16) {
                const __m512 value = _mm512_loadu_ps(s_.result + static_cast<int64_t>(row) * dim16_ + d);
                _mm512_mask_storeu_ps(to + d, tail_mask(d), _mm512_mul_ps(value, inverse));
            }
        }
    }

    const AttentionShape& shape_;
    const AttentionRequest& request_;
    const uint8_t* keys_;
    const uint8_t* values_;
    int kv_head_;
    int first_token_;
    int group_;
    int num_rows_;
    int first_position_;
    int last_position_;
    int dim16_;
    int num_words_;
    Scratch s_;
};

}  // namespace pelton::avx512
