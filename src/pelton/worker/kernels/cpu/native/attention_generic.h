// Attention of one key-value head over a tile of one request's tokens, in vectors of float32.
//
// Online softmax (Milakov and Gimelshein, arXiv:1805.02867) over tiles of kTilePositions positions. What the caches
// hold in bfloat16 is widened once per tile.
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"
#include "vector_math.h"

namespace pelton::PELTON_ISA {

constexpr int kTileVectors = 16 / kLanes;  // 16 positions or dimensions at a time

// The square of kLanes rows, turned.
inline void transpose(Floats (&rows)[kLanes]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    Floats t[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        rows[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        rows[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        rows[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        rows[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(rows[i], rows[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) rows[i] = t[i];
#else
    float square[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store(square[i], rows[i]);
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) rows[i][j] = square[j][i];
    }
#endif
}

// Loads [kLanes] values at `index` of a cache of one type; `left` of them are inside the head.
struct CachedF32 {
    static Floats load(const void* cache, int64_t index, int left) {
        return load_some(static_cast<const float*>(cache) + index, left);
    }
};

struct CachedBF16 {
    static Floats load(const void* cache, int64_t index, int left) {
        const auto* from = static_cast<const uint16_t*>(cache) + index;
        if (left >= kLanes) return load_bfloat16(from);
        Floats values = {};
        for (int i = 0; i < left; ++i) values[i] = bfloat16_to_float(from[i]);
        return values;
    }
};

template <class Cached>
class HeadTile {
public:
    HeadTile(const AttentionShape& shape, const AttentionRequest& request, const void* keys, const void* values,
             int kv_head, int first_token, int num_tokens, float* scratch)
        : shape_(shape),
          request_(request),
          keys_(keys),
          values_(values),
          kv_head_(kv_head),
          first_token_(first_token),
          group_(shape.num_heads / shape.num_kv_heads),
          num_rows_(num_tokens * group_),
          first_position_(request.seq_len - request.num_tokens + first_token),
          last_position_(first_position_ + num_tokens - 1),
          dim16_((shape.head_dim + 15) / 16 * 16) {
        const auto take = [&scratch](int64_t count) {
            float* part = scratch;
            scratch += (count + 15) / 16 * 16;
            return part;
        };
        tile_keys_ = take(static_cast<int64_t>(dim16_) * kTilePositions);
        tile_values_ = take(static_cast<int64_t>(dim16_) * kTilePositions);
        queries_ = take(static_cast<int64_t>(num_rows_) * dim16_);
        scores_ = take(static_cast<int64_t>(num_rows_) * kTilePositions);
        result_ = take(static_cast<int64_t>(num_rows_) * dim16_);
        maxima_ = take(num_rows_);
        sums_ = take(num_rows_);
    }

    void run() {
        load_queries();
        std::fill_n(result_, static_cast<int64_t>(num_rows_) * dim16_, 0.0f);
        std::fill_n(maxima_, num_rows_, -std::numeric_limits<float>::infinity());
        std::fill_n(sums_, num_rows_, 0.0f);
        const int first = shape_.sliding_window > 0 ? std::max(0, first_position_ - shape_.sliding_window + 1) : 0;
        for (int start = first / kTilePositions * kTilePositions; start <= last_position_; start += kTilePositions) {
            load_tile(std::max(start, first), std::min(start + kTilePositions, last_position_ + 1), start);
            for_each_tile([this]<int kRows>(int row) {
                for (int i = 0; i < kTilePositions; i += 16) score_tile<kRows>(row, i);
            });
            for (int row = 0; row < num_rows_; ++row) soften(row, start);
            for_each_tile([this]<int kRows>(int row) {
                for (int d = 0; d < dim16_; d += 16) add_tile<kRows>(row, d);
            });
        }
        store_result();
    }

private:
    int64_t row_offset(int row, int64_t token_stride) const {
        return (first_token_ + row / group_) * token_stride +
               static_cast<int64_t>(kv_head_ * group_ + row % group_) * shape_.head_dim;
    }

    void load_queries() {
        for (int row = 0; row < num_rows_; ++row) {
            const float* from = request_.query + row_offset(row, request_.ld_query);
            for (int d = 0; d < dim16_; d += kLanes) {
                store(queries_ + static_cast<int64_t>(row) * dim16_ + d,
                      load_some(from + d, std::max(0, shape_.head_dim - d)) * splat(shape_.scale));
            }
        }
    }

    // Positions [from, to) as keys [D16][kTilePositions] and values [kTilePositions][D16]; the rest is 0.
    void load_tile(int from, int to, int start) {
        int64_t index[kTilePositions];
        for (int i = 0; i < kTilePositions; ++i) {
            const int position = start + i;
            index[i] = -1;
            if (position < from || position >= to) continue;
            const int64_t block = request_.block_table[position / shape_.block_size];
            const int64_t slot = block * shape_.block_size + position % shape_.block_size;
            index[i] = (slot * shape_.num_kv_heads + kv_head_) * shape_.head_dim;
        }
        for (int i = 0; i < kTilePositions; i += kLanes) {
            for (int d = 0; d < dim16_; d += kLanes) {
                const int left = std::max(0, shape_.head_dim - d);
                Floats square[kLanes];
                for (int j = 0; j < kLanes; ++j) {
                    square[j] = index[i + j] < 0 ? Floats{} : Cached::load(keys_, index[i + j] + d, left);
                    const Floats value = index[i + j] < 0 ? Floats{} : Cached::load(values_, index[i + j] + d, left);
                    store(tile_values_ + static_cast<int64_t>(i + j) * dim16_ + d, value);
                }
                transpose(square);
                for (int j = 0; j < kLanes; ++j) {
                    store(tile_keys_ + static_cast<int64_t>(d + j) * kTilePositions + i, square[j]);
                }
            }
        }
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

    // sum[r][16] = base[r][16] + the sum over `length` of a[r][i] * b[i][16], in order.
    template <int kRows>
    static void multiply(const float* a, int64_t ld_a, const float* b, int64_t ld_b, int length, float* sums,
                         int64_t ld_sums, bool is_first) {
        Floats sum[kRows][kTileVectors];
        for (int r = 0; r < kRows; ++r) {
            for (int j = 0; j < kTileVectors; ++j) {
                sum[r][j] = is_first ? Floats{} : load<Floats>(sums + r * ld_sums + j * kLanes);
            }
        }
        for (int i = 0; i < length; ++i) {
            Floats vector[kTileVectors];
            for (int j = 0; j < kTileVectors; ++j) vector[j] = load<Floats>(b + i * ld_b + j * kLanes);
            for (int r = 0; r < kRows; ++r) {
                const Floats factor = splat(a[r * ld_a + i]);
                for (int j = 0; j < kTileVectors; ++j) sum[r][j] = multiply_add(factor, vector[j], sum[r][j]);
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int j = 0; j < kTileVectors; ++j) store(sums + r * ld_sums + j * kLanes, sum[r][j]);
        }
    }

    template <int kRows>
    void score_tile(int row, int i) {
        multiply<kRows>(queries_ + static_cast<int64_t>(row) * dim16_, dim16_, tile_keys_ + i, kTilePositions,
                        shape_.head_dim, scores_ + static_cast<int64_t>(row) * kTilePositions + i, kTilePositions,
                        true);
    }

    template <int kRows>
    void add_tile(int row, int d) {
        multiply<kRows>(scores_ + static_cast<int64_t>(row) * kTilePositions, kTilePositions, tile_values_ + d, dim16_,
                        kTilePositions, result_ + static_cast<int64_t>(row) * dim16_ + d, dim16_, false);
    }

    // Scores to probabilities relative to the running maximum; rescales the row's sums where that grows.
    void soften(int row, int start) {
        const int position = first_position_ + row / group_;
        const int first = shape_.sliding_window > 0 ? position - shape_.sliding_window + 1 : 0;
        float* scores = scores_ + static_cast<int64_t>(row) * kTilePositions;
        const float hidden = -std::numeric_limits<float>::infinity();
        Floats largest = splat(hidden);
        for (int i = 0; i < kTilePositions; i += kLanes) {
            Floats score = load<Floats>(scores + i);
            if (shape_.softcap > 0.0f) score = tanh_of(score / splat(shape_.softcap)) * splat(shape_.softcap);
            Ints seen_at;
            for (int lane = 0; lane < kLanes; ++lane) seen_at[lane] = lane;
            seen_at += splat(start + i);
            score = select((seen_at <= splat(position)) & (seen_at >= splat(first)), score, splat(hidden));
            store(scores + i, score);
            largest = max(largest, score);
        }
        const float old_maximum = maxima_[row];
        const float maximum = std::max(old_maximum, reduce_max(largest));
        const Floats shift = splat(maximum == hidden ? 0.0f : maximum);
        Floats sum = {};
        for (int i = 0; i < kTilePositions; i += kLanes) {
            const Floats p = exp_negative(load<Floats>(scores + i) - shift);
            sum += p;
            store(scores + i, p);
        }
        const float tile_sum = reduce_add(sum);
        if (maximum > old_maximum) {
            maxima_[row] = maximum;
            const float factor = exp_negative(splat(old_maximum - maximum))[0];
            sums_[row] = sums_[row] * factor + tile_sum;
            float* result = result_ + static_cast<int64_t>(row) * dim16_;
            for (int d = 0; d < dim16_; d += kLanes) store(result + d, load<Floats>(result + d) * splat(factor));
        } else {
            sums_[row] += tile_sum;
        }
    }

    void store_result() {
        const int64_t out_stride = static_cast<int64_t>(shape_.num_heads) * shape_.head_dim;
        for (int row = 0; row < num_rows_; ++row) {
            const Floats inverse = splat(1.0f / sums_[row]);
            const float* from = result_ + static_cast<int64_t>(row) * dim16_;
            float* to = request_.out + row_offset(row, out_stride);
            for (int d = 0; d < shape_.head_dim; d += kLanes) {
                store_some(to + d, load<Floats>(from + d) * inverse, shape_.head_dim - d);
            }
        }
    }

    const AttentionShape& shape_;
    const AttentionRequest& request_;
    const void* keys_;
    const void* values_;
    int kv_head_;
    int first_token_;
    int group_;
    int num_rows_;
    int first_position_;
    int last_position_;
    int dim16_;
    float* tile_keys_;    // [D16][kTilePositions]
    float* tile_values_;  // [kTilePositions][D16]
    float* queries_;      // [rows][D16], scaled
    float* scores_;       // [rows][kTilePositions]; then probabilities
    float* result_;       // [rows][D16]
    float* maxima_;
    float* sums_;
};

inline void attend_head(const AttentionShape& shape, const AttentionRequest& request, const void* keys,
                        const void* values, int kv_head, int first_token, int num_tokens, float* scratch) {
    if (shape.kv_type == KVType::F32) {
        HeadTile<CachedF32>(shape, request, keys, values, kv_head, first_token, num_tokens, scratch).run();
    } else {
        HeadTile<CachedBF16>(shape, request, keys, values, kv_head, first_token, num_tokens, scratch).run();
    }
}

}  // namespace pelton::PELTON_ISA
