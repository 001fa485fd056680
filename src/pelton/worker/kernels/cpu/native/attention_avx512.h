// Attention of one key-value head with AVX-512.
//
// A query head of a token, a column (attention.h), is a row here: scores are its dimensions times 16 positions at once,
// results its probabilities times 16 dimensions. So that neither needs a transposition, a block holds a head's keys by
// dimension, [K][D][block_size], and its values by position, [K][block_size][D]. Of bfloat16, two dimensions or two
// positions share a word of 32 bits: [K][D / 2][block_size][2] and [K][block_size / 2][D][2].
//
// Law 3: positions are taken in chunks that start at multiples of kChunkPositions. What a chunk adds to a row depends
// on that row and the chunk alone; chunks are merged in order.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "activation_avx512.h"
#include "attention.h"
#include "attention_schedule.h"
#include "exp2_avx512.h"
#include "unrolled.h"
#include "upcoming_lines.h"

namespace pelton::avx512 {

constexpr int kBlockPositions = 16;  // positions in a register
constexpr int kMostRows = 6;         // of a product, with four registers each
constexpr int kBlockWords = 64;      // of a row and a key that one sum takes
constexpr float kHidden = -1e30f;    // maximum of a row that sees nothing: finite, so that it subtracts

// What the lanes of a product hold, a "word": a float32, or two bfloat16. kCached: values to a word of the cache, which
// becomes kSplit words of a tile.
struct FloatWords {
    static constexpr int kCached = 1, kSplit = 1, kPerWord = 1;
    using Element = float;
    static void split(__m512i line, __m512i (&words)[1]) { words[0] = line; }
    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static void store(Element* to, __m512 values) { _mm512_storeu_ps(to, values); }
};

// bfloat16 in the cache, float32 products: for processors whose bfloat16 products are the slower ones.
struct WideWords : FloatWords {
    static constexpr int kCached = 2, kSplit = 2;
    static void split(__m512i line, __m512i (&words)[2]) {
        words[0] = _mm512_slli_epi32(line, 16);
        words[1] = _mm512_and_si512(line, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    }
};

struct PairWords {
    static constexpr int kCached = 2, kSplit = 1, kPerWord = 2;
    using Element = uint16_t;
    static void split(__m512i line, __m512i (&words)[1]) { words[0] = line; }
    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    static void store(Element* to, __m512 values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }
};

// What some positions add to a row: the result [D], its maximum as a power of 2, and the probabilities' sum.
struct RowSums {
    float* result;
    float* maximum;
    float* sum;

    // One of a part, [16][D] results, [16] maxima, [16] sums.
    static RowSums of(float* part, int dim, int lane) {
        float* maxima = part + static_cast<int64_t>(kPartColumns) * dim;
        return {part + static_cast<int64_t>(lane) * dim, maxima + lane, maxima + kPartColumns + lane};
    }
    static int64_t part_floats(int dim) { return static_cast<int64_t>(dim + 2) * kPartColumns; }

    void clear(int dim) const {
        std::fill_n(result, dim, 0.0f);
        *maximum = kHidden;
        *sum = 0.0f;
    }
    void add(const RowSums& part, int dim) const {
        const float largest = std::max(*maximum, *part.maximum);
        const __m512 keep = exp2_negative(_mm512_set1_ps(*maximum - largest));
        const __m512 take = exp2_negative(_mm512_set1_ps(*part.maximum - largest));
        *maximum = largest;
        *sum = *sum * _mm512_cvtss_f32(keep) + *part.sum * _mm512_cvtss_f32(take);
        for (int d = 0; d < dim; d += 16) {
            const __m512 added = _mm512_mul_ps(_mm512_loadu_ps(part.result + d), take);
            _mm512_storeu_ps(result + d, _mm512_fmadd_ps(_mm512_loadu_ps(result + d), keep, added));
        }
    }
    void store(int dim, float* out) const {
        const __m512 inverse = _mm512_set1_ps(1.0f / *sum);
        for (int d = 0; d < dim; d += 16) {
            _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(result + d), inverse));
        }
    }
};

// Columns that see the same blocks.
template <class Words>
class HeadRows {
    using Element = typename Words::Element;
    static constexpr int kPerWord = Words::kPerWord;
    static constexpr int kTileBlocks = kTilePositions / kBlockPositions;
    static constexpr int kChunkTiles = kChunkPositions / kTilePositions;
    static constexpr int kWordsBetween = 4;

public:
    HeadRows(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
             float* scratch)
        : shape_(shape),
          run_(run),
          keys_(static_cast<const uint32_t*>(keys)),
          values_(static_cast<const uint32_t*>(values)),
          kv_head_(kv_head),
          dim_(shape.head_dim),
          num_words_(shape.head_dim / kPerWord),
          block_words_(static_cast<int64_t>(shape.block_size) * shape.head_dim / Words::kCached),
          scale_(shape.softcap > 0.0f ? 1.0f : shape.scale * kLog2E),
          upcoming_(shape, run.upcoming, keys, values) {
        const auto take = [&scratch](int64_t num_floats) {
            float* part = scratch;
            scratch += num_floats;
            return part;
        };
        tile_keys_ = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(dim_) * kTilePositions));
        tile_values_ = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(dim_) * kTilePositions));
        queries_ = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(run.num_columns) * dim_));
        scores_ = take(static_cast<int64_t>(run.num_columns) * kChunkPositions);
        totals_ = take(num_parts(run.num_columns) * RowSums::part_floats(dim_));
        parts_ = take(num_parts(run.num_columns) * RowSums::part_floats(dim_));
        columns_ = reinterpret_cast<int*>(take(run.num_columns));
        load_queries();
    }

    static int64_t scratch_floats(int dim, int num_columns) {
        return 2 * static_cast<int64_t>(dim) * kTilePositions +
               static_cast<int64_t>(num_columns) * (dim + kChunkPositions + 1) +
               2 * num_parts(num_columns) * RowSums::part_floats(dim) + 16;
    }

    // All that the columns see; writes their results.
    void run() {
        const int first = first_visible(first_position_) / kChunkPositions * kChunkPositions;
        for (int start = first; start <= last_position_; start += kChunkPositions) {
            // The first one's sums are the totals: to add them to nothing would leave their bits as they are.
            add_chunk(start, start == first ? totals_ : parts_);
            for (int row = 0; start != first && row < num_rows_; ++row) {
                sums_of(totals_, row).add(sums_of(parts_, row), dim_);
            }
        }
        for (int row = 0; row < num_rows_; ++row) sums_of(totals_, row).store(dim_, run_.columns[columns_[row]].out);
    }

    // What the chunk at `start` adds, to parts of 16 columns each.
    void run_chunk(int start, float* parts) { add_chunk(start, parts); }

private:
    static int64_t num_parts(int num_columns) { return (num_columns + kPartColumns - 1) / kPartColumns; }

    int first_visible(int position) const {
        return shape_.sliding_window > 0 ? std::max(0, position - shape_.sliding_window + 1) : 0;
    }
    int position_of(int row) const { return run_.columns[columns_[row]].position; }
    uint32_t* query_of(int row) const { return queries_ + static_cast<int64_t>(row) * num_words_; }
    float* scores_of(int row) const { return scores_ + static_cast<int64_t>(row) * kChunkPositions; }
    // In place of the scores.
    const uint32_t* probabilities_of(int row) const { return reinterpret_cast<const uint32_t*>(scores_of(row)); }
    RowSums sums_of(float* parts, int row) const {
        const int column = columns_[row];
        return RowSums::of(parts + column / kPartColumns * RowSums::part_floats(dim_), dim_, column % kPartColumns);
    }

    // Rows are the columns that there are.
    void load_queries() {
        for (int column = 0; column < run_.num_columns; ++column) {
            const AttentionColumn& own = run_.columns[column];
            if (own.query == nullptr) continue;
            auto* to = reinterpret_cast<Element*>(query_of(num_rows_));
            for (int d = 0; d < dim_; d += 16) Words::store(to + d, _mm512_loadu_ps(own.query + d));
            first_position_ = num_rows_ == 0 ? own.position : std::min(first_position_, own.position);
            last_position_ = num_rows_ == 0 ? own.position : std::max(last_position_, own.position);
            columns_[num_rows_++] = column;
        }
    }

    const uint32_t* head_at(const uint32_t* cache, int position) const {
        return cache + (run_.block_table[position / shape_.block_size] * shape_.num_kv_heads + kv_head_) * block_words_;
    }

    // Positions of the tile at `start` that some row sees.
    struct Extent {
        int first;
        int end;
    };
    Extent extent_of(int start, int length) const {
        return {std::clamp(first_visible(first_position_) - start, 0, length),
                std::clamp(last_position_ + 1 - start, 0, length)};
    }
    static bool is_empty(const Extent& extent) { return extent.first >= extent.end; }

    // Blocks of 16 positions that hold some of them.
    static int first_block(const Extent& extent) { return extent.first / kBlockPositions; }
    static int end_block(const Extent& extent) { return (extent.end + kBlockPositions - 1) / kBlockPositions; }

    // [D / kPerWord][kTilePositions] words.
    void load_keys(int start, const Extent& extent) const {
        for (int block = first_block(extent); block < end_block(extent); ++block) {
            const int position = start + block * kBlockPositions;
            const uint32_t* from = head_at(keys_, position) + position % shape_.block_size;
            uint32_t* to = tile_keys_ + block * kBlockPositions;
            for (int i = 0; i < dim_ / Words::kCached; ++i, from += shape_.block_size) {
                __m512i words[Words::kSplit];
                Words::split(_mm512_loadu_si512(from), words);
                for (const __m512i& word : words) {
                    _mm512_storeu_si512(to, word);
                    to += kTilePositions;
                }
            }
        }
    }

    // [kTilePositions / kPerWord][D] words. Slots out of the rows' windows or not written yet become zeros: they may
    // hold anything, NaN too, and 0 times NaN would reach the result.
    void load_values(int start, const Extent& extent) const {
        constexpr int kLines = kBlockPositions / Words::kCached;
        for (int block = first_block(extent); block < end_block(extent); ++block) {
            const int position = start + block * kBlockPositions;
            const uint32_t* from =
                head_at(values_, position) + static_cast<int64_t>(position % shape_.block_size) * dim_ / Words::kCached;
            uint32_t* to = tile_values_ + static_cast<int64_t>(block) * kBlockPositions / kPerWord * dim_;
            for (int line = 0; line < kLines; ++line, from += dim_, to += Words::kSplit * dim_) {
                __m512i seen[Words::kSplit];
                for (int i = 0; i < Words::kSplit; ++i) {
                    seen[i] = seen_mask(extent, block * kBlockPositions + line * Words::kCached + i);
                }
                for (int d = 0; d < dim_; d += 16) {
                    __m512i words[Words::kSplit];
                    Words::split(_mm512_loadu_si512(from + d), words);
                    for (int i = 0; i < Words::kSplit; ++i) {
                        _mm512_storeu_si512(to + i * dim_ + d, _mm512_and_si512(words[i], seen[i]));
                    }
                }
            }
        }
    }

    // Ones for what is seen of the word that begins with `position` of a tile.
    static __m512i seen_mask(const Extent& extent, int position) {
        const auto is_seen = [&extent](int at) { return at >= extent.first && at < extent.end; };
        if constexpr (kPerWord == 1) return _mm512_set1_epi32(is_seen(position) ? -1 : 0);
        const uint32_t mask = (is_seen(position) ? 0xffffu : 0) | (is_seen(position + 1) ? 0xffff0000u : 0);
        return _mm512_set1_epi32(static_cast<int>(mask));
    }

    // Rows in groups of nearly equal size, 6 at most: 7 are 4 and 3. What comes next, if anything, is fetched all along.
    template <class Tile>
    void for_each_group(const Tile& tile) {
        upcoming_.is_empty() ? for_each_group<false>(tile) : for_each_group<true>(tile);
    }

    template <bool kFetches, class Tile>
    void for_each_group(const Tile& tile) {
        const int num_groups = (num_rows_ + kMostRows - 1) / kMostRows;
        lines_at_once_ = (2 * kPerWord * kWordsBetween + num_groups - 1) / num_groups;
        for (int i = 0; i < num_groups; ++i) {
            const int row = static_cast<int>(static_cast<int64_t>(num_rows_) * i / num_groups);
            switch (static_cast<int>(static_cast<int64_t>(num_rows_) * (i + 1) / num_groups) - row) {
                case 6: tile.template operator()<6, kFetches>(row); break;
                case 5: tile.template operator()<5, kFetches>(row); break;
                case 4: tile.template operator()<4, kFetches>(row); break;
                case 3: tile.template operator()<3, kFetches>(row); break;
                case 2: tile.template operator()<2, kFetches>(row); break;
                default: tile.template operator()<1, kFetches>(row); break;
            }
        }
    }

    // After every word of a product.
    template <bool kFetches>
    void fetch_some(int word) {
        if constexpr (kFetches) {
            if (word % kWordsBetween == 0) upcoming_.fetch(lines_at_once_);
        }
    }

    void add_chunk(int start, float* parts) {
        const Extent chunk = extent_of(start, kChunkPositions);
        if (is_empty(chunk)) {
            for (int row = 0; row < num_rows_; ++row) sums_of(parts, row).clear(dim_);
            return;
        }
        const int first_tile = chunk.first / kTilePositions,
                  end_tile = (chunk.end + kTilePositions - 1) / kTilePositions;
        for (int tile = first_tile; tile < end_tile; ++tile) {
            const int at = tile * kTilePositions;
            load_keys(start + at, extent_of(start + at, kTilePositions));
            for_each_group([this, at]<int kRows, bool kFetches>(int row) { score<kRows, kFetches>(row, at); });
        }
        for (int row = 0; row < num_rows_; ++row) soften(row, start, first_tile, end_tile, sums_of(parts, row));
        for (int tile = first_tile; tile < end_tile; ++tile) {
            const int at = tile * kTilePositions;
            const Extent extent = extent_of(start + at, kTilePositions);
            load_values(start + at, extent);
            for_each_group([&]<int kRows, bool kFetches>(int row) {
                add_values<kRows, kFetches>(row, at, extent, tile == first_tile, parts);
            });
        }
    }

    // Scores of the tile from `at` of the chunk on: sums of kBlockWords, put together as they come. One running sum over a
    // head of 256 would lose twice as much.
    template <int kRows, bool kFetches>
    void score(int row, int at) {
        for (int first = 0; first < num_words_; first += kBlockWords) {
            score_words<kRows, kFetches>(row, at, first, std::min(first + kBlockWords, num_words_));
        }
    }

    template <int kRows, bool kFetches>
    void score_words(int row, int at, int first, int end) {
        __m512 sum[kRows][kTileBlocks];
        unrolled<kRows * kTileBlocks>([&](auto i) __attribute__((always_inline)) {
            sum[i / kTileBlocks][i % kTileBlocks] = _mm512_setzero_ps();
        });
        const uint32_t *query = query_of(row), *keys = tile_keys_ + static_cast<int64_t>(first) * kTilePositions;
        const int64_t stride = num_words_;
        for (int word = first; word < end; ++word, keys += kTilePositions) {
            __m512i key[kTileBlocks];
            unrolled<kTileBlocks>([&](auto j) __attribute__((always_inline)) {
                key[j] = _mm512_loadu_si512(keys + 16 * j);
            });
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                const __m512i own = _mm512_set1_epi32(static_cast<int>(query[r * stride + word]));
                unrolled<kTileBlocks>([&](auto j) __attribute__((always_inline)) {
                    sum[r][j] = Words::multiply_add(sum[r][j], own, key[j]);
                });
            });
            fetch_some<kFetches>(word);
        }
        unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
            float* to = scores_of(row + r) + at;
            unrolled<kTileBlocks>([&](auto j) __attribute__((always_inline)) {
                const __m512 before = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(to + 16 * j);
                _mm512_storeu_ps(to + 16 * j, _mm512_add_ps(before, sum[r][j]));
            });
        });
    }

    // A row's scores of some tiles to probabilities relative to its largest; what it does not see has none.
    void soften(int row, int start, int first_tile, int end_tile, const RowSums& sums) const {
        float* scores = scores_of(row);
        auto* probabilities = reinterpret_cast<Element*>(scores);
        const int begin = first_tile * kTilePositions, end = end_tile * kTilePositions;
        const int position = position_of(row);
        const int first = std::clamp(first_visible(position) - start, begin, end),
                  last = std::clamp(position + 1 - start, first, end);
        // Registers of positions that it sees, whole ones and others.
        const auto for_each_seen = [first, last](const auto& use) __attribute__((always_inline)) {
            const int whole = std::min((first + 15) / 16 * 16, last / 16 * 16);
            const auto mask_of = [first, last](int i) {
                const uint32_t below = (1u << std::clamp(last - i, 0, 16)) - 1,
                               before = (1u << std::clamp(first - i, 0, 16)) - 1;
                return static_cast<__mmask16>(below & ~before);
            };
            int i = first / 16 * 16;
            for (; i < whole; i += 16) use(i, mask_of(i));
            for (; i + 16 <= last; i += 16) use(i, static_cast<__mmask16>(0xffff));
            for (; i < last; i += 16) use(i, mask_of(i));
        };
        __m512 largest = _mm512_set1_ps(kHidden);
        for_each_seen([&](int i, __mmask16 seen) __attribute__((always_inline)) {
            __m512 score = _mm512_loadu_ps(scores + i);
            if (shape_.softcap > 0.0f) {
                const __m512 in = _mm512_set1_ps(shape_.scale / shape_.softcap),
                             out = _mm512_set1_ps(shape_.softcap * kLog2E);
                score = _mm512_mul_ps(tanh_of(_mm512_mul_ps(score, in)), out);
                _mm512_storeu_ps(scores + i, score);
            }
            largest = _mm512_mask_max_ps(largest, seen, largest, score);
        });
        const float maximum = first < last ? _mm512_reduce_max_ps(largest) * scale_ : kHidden;
        const __m512 scale = _mm512_set1_ps(scale_), shift = _mm512_set1_ps(maximum);
        __m512 sum = _mm512_setzero_ps();
        const int seen_begin = first / 16 * 16, seen_end = (last + 15) / 16 * 16;
        for (int i = begin; i < seen_begin; i += 16) Words::store(probabilities + i, _mm512_setzero_ps());
        for_each_seen([&](int i, __mmask16 seen) __attribute__((always_inline)) {
            const __m512 power = exp2_negative(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scale, shift));
            const __m512 p = _mm512_maskz_mov_ps(seen, power);
            sum = _mm512_add_ps(sum, p);
            Words::store(probabilities + i, p);
        });
        for (int i = seen_end; i < end; i += 16) Words::store(probabilities + i, _mm512_setzero_ps());
        *sums.maximum = maximum;
        *sums.sum = _mm512_reduce_add_ps(sum);
    }

    // The tile of values from `at` of the chunk on, added to what the rows have or, where it is the first, put there.
    template <int kRows, bool kFetches>
    void add_values(int row, int at, const Extent& extent, bool is_first, float* parts) {
        const int first = first_block(extent) * kBlockPositions, end = end_block(extent) * kBlockPositions;
        const uint32_t* values = tile_values_ + static_cast<int64_t>(first) / kPerWord * dim_;
        const uint32_t* probabilities[kRows];
        float* results[kRows];
        unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
            probabilities[r] = probabilities_of(row + r) + at / kPerWord;
            results[r] = sums_of(parts, row + r).result;
        });
        for (int d = 0; d < dim_;) {
            const bool is_wide = d + 64 <= dim_;
            const auto add = is_wide ? &HeadRows::add_columns<kRows, 4, kFetches> : &HeadRows::add_columns<kRows, 1, kFetches>;
            (this->*add)(probabilities, first / kPerWord, end / kPerWord, values + d, is_first, results, d);
            d += is_wide ? 64 : 16;
        }
    }

    template <int kRows, int kVectors, bool kFetches>
    void add_columns(const uint32_t* const (&probabilities)[kRows], int first, int end, const uint32_t* values,
                     bool is_first, float* const (&results)[kRows], int d) {
        const int64_t stride = dim_;
        __m512 sum[kRows][kVectors];
        unrolled<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
            constexpr int r = i / kVectors, j = i % kVectors;
            sum[r][j] = is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(results[r] + d + 16 * j);
        });
        for (int word = first; word < end; ++word, values += stride) {
            __m512i value[kVectors];
            unrolled<kVectors>([&](auto j) __attribute__((always_inline)) {
                value[j] = _mm512_loadu_si512(values + 16 * j);
            });
            unrolled<kRows>([&](auto r) __attribute__((always_inline)) {
                const __m512i own = _mm512_set1_epi32(static_cast<int>(probabilities[r][word]));
                unrolled<kVectors>([&](auto j) __attribute__((always_inline)) {
                    sum[r][j] = Words::multiply_add(sum[r][j], own, value[j]);
                });
            });
            fetch_some<kFetches>(word);
        }
        unrolled<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
            constexpr int r = i / kVectors, j = i % kVectors;
            _mm512_storeu_ps(results[r] + d + 16 * j, sum[r][j]);
        });
    }

    const AttentionShape& shape_;
    const ColumnRun& run_;
    const uint32_t* keys_;
    const uint32_t* values_;
    int kv_head_;
    int dim_;
    int num_words_;        // of a query
    int64_t block_words_;  // of a head in a block
    float scale_;          // of scores, as powers of 2
    UpcomingLines upcoming_;
    int lines_at_once_ = 0;  // of what comes next, after every kWordsBetween words
    int num_rows_ = 0;
    int first_position_ = 0;
    int last_position_ = 0;
    int* columns_;  // of each row
    uint32_t* tile_keys_;
    uint32_t* tile_values_;
    uint32_t* queries_;
    float* scores_;  // [rows][kChunkPositions]; then probabilities as elements
    float* totals_;
    float* parts_;
};

inline bool can_attend(const AttentionShape& shape) {
    return shape.block_size % kBlockPositions == 0 && shape.head_dim % 16 == 0;
}

inline void store_head(const AttentionShape& shape, const float* key, const float* value, int offset, void* keys,
                       void* values) {
    const int dim = shape.head_dim, block_size = shape.block_size;
    if (shape.kv_type == KVType::F32) {
        for (int d = 0; d < dim; ++d) static_cast<float*>(keys)[static_cast<int64_t>(d) * block_size + offset] = key[d];
        std::copy_n(value, dim, static_cast<float*>(values) + static_cast<int64_t>(offset) * dim);
        return;
    }
    auto* key_words = static_cast<uint32_t*>(keys) + offset;
    auto* value_words = static_cast<uint32_t*>(values) + static_cast<int64_t>(offset / 2) * dim;
    const bool is_odd = offset % 2 != 0;
    for (int d = 0; d < dim; d += 16) {
        alignas(32) uint32_t pairs[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs),
                           reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(key + d))));
        for (int i = 0; i < 8; ++i) key_words[static_cast<int64_t>(d / 2 + i) * block_size] = pairs[i];
        const auto halves = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(value + d)));
        const __m512i words = _mm512_cvtepu16_epi32(halves);
        _mm512_mask_storeu_epi16(value_words + d, is_odd ? 0xaaaaaaaa : 0x55555555,
                                 is_odd ? _mm512_slli_epi32(words, 16) : words);
    }
}

// Calls `use` with the rows of a run, whose products are of the fastest kind.
template <class Use>
void with_rows(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
               float* scratch, const Use& use) {
    // On Intel's cores so far, two bfloat16 products take twice as long as a float32 one.
    static const bool has_fast_bf16 = __builtin_cpu_is("amd");
    if (shape.kv_type == KVType::F32) {
        use(HeadRows<FloatWords>(shape, run, keys, values, kv_head, scratch));
    } else if (has_fast_bf16) {
        use(HeadRows<PairWords>(shape, run, keys, values, kv_head, scratch));
    } else {
        use(HeadRows<WideWords>(shape, run, keys, values, kv_head, scratch));
    }
}

inline void attend(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values, int kv_head,
                   float* scratch) {
    with_rows(shape, run, keys, values, kv_head, scratch, [](auto&& rows) { rows.run(); });
}

inline void attend_chunk(const AttentionShape& shape, const ColumnRun& run, const void* keys, const void* values,
                         int kv_head, int start, float* parts, float* scratch) {
    with_rows(shape, run, keys, values, kv_head, scratch, [=](auto&& rows) { rows.run_chunk(start, parts); });
}

inline void merge_chunks(const AttentionShape& shape, std::span<const ChunkPart> parts, const AttentionColumn* columns,
                         int num_columns, float* scratch) {
    for (int i = 0; i < num_columns; ++i) {
        const RowSums total = RowSums::of(scratch, shape.head_dim, 0);
        total.clear(shape.head_dim);
        for (const ChunkPart& part : parts) {
            total.add(RowSums::of(part.data, shape.head_dim, part.lane + i), shape.head_dim);
        }
        total.store(shape.head_dim, columns[i].out);
    }
}

}  // namespace pelton::avx512
