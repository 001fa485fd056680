#include "attention_schedule.h"

#include <algorithm>
#include <map>

namespace pelton {

namespace {

// Enough to make a chunk's reading cheap, few enough to share out among threads.
constexpr int kMaxMembers = 32;

int tiles_of(int num_members, int num_columns) {
    const int per_tile = kPartColumns / num_columns;
    return (num_members + per_tile - 1) / per_tile;
}

// The blocks of a chunk that its columns see whole, and what else two requests must have in common to share it.
std::vector<int64_t> sharing_key(const AttentionShape& shape, const AttentionSchedule::Request& request, int start) {
    std::vector<int64_t> key = {request.num_tokens};
    const int last = (start + kChunkPositions - 1) / shape.block_size;
    key.insert(key.end(), request.block_table + start / shape.block_size, request.block_table + last + 1);
    return key;
}

}  // namespace

AttentionSchedule::AttentionSchedule(const AttentionShape& shape, std::span<const Request> requests, bool in_chunks) {
    const int group = shape.num_heads / shape.num_kv_heads;
    // Chunks that may take one more member, by start and key.
    std::map<std::pair<int, std::vector<int64_t>>, int> open;
    std::vector<std::pair<int, int>> places;  // chunk and member, of the merges' parts
    for (int index = 0; index < static_cast<int>(requests.size()); ++index) {
        const Request& request = requests[index];
        if (!in_chunks || request.num_tokens * group > kPartColumns || request.seq_len <= kChunkPositions) {
            add_runs(index, request);
            continue;
        }
        const int first_position = request.seq_len - request.num_tokens;
        const int first = shape.sliding_window > 0 ? std::max(0, first_position - shape.sliding_window + 1) : 0;
        merges.push_back({index, {}});
        for (int start = first / kChunkPositions * kChunkPositions; start < request.seq_len; start += kChunkPositions) {
            int chunk = static_cast<int>(chunks.size());
            if (shape.sliding_window == 0 && start + kChunkPositions <= first_position + 1) {
                int& shared = open.try_emplace({start, sharing_key(shape, request, start)}, chunk).first->second;
                if (shared < chunk && chunks[shared].members.size() == kMaxMembers) shared = chunk;
                chunk = shared;
            }
            if (chunk == static_cast<int>(chunks.size())) chunks.push_back({start, 0, {}});
            places.emplace_back(chunk, static_cast<int>(chunks[chunk].members.size()));
            merges.back().parts.emplace_back();
            chunks[chunk].members.push_back(index);
        }
    }
    for (auto& chunk : chunks) {
        const int columns = requests[chunk.members.front()].num_tokens * group;
        const int tiles = tiles_of(static_cast<int>(chunk.members.size()), columns);
        chunk.first_tile = num_tiles;
        num_tiles += tiles;
        num_columns = std::max(num_columns, tiles * kPartColumns);
    }
    size_t next = 0;
    for (auto& merge : merges) {
        const int columns = requests[merge.request].num_tokens * group, per_tile = kPartColumns / columns;
        for (auto& part : merge.parts) {
            const auto [chunk, member] = places[next++];
            part = {chunks[chunk].first_tile + member / per_tile, member % per_tile * columns};
        }
    }
    for (int run = 0; run < static_cast<int>(runs.size()); ++run) {
        const Request& request = requests[runs[run].request];
        const int64_t positions = request.seq_len - request.num_tokens + runs[run].first_token + runs[run].num_tokens;
        pieces.push_back({run, -1, runs[run].num_tokens * group * positions});
        num_columns = std::max(num_columns, runs[run].num_tokens * group);
    }
    for (int chunk = 0; chunk < static_cast<int>(chunks.size()); ++chunk) {
        const int64_t columns = static_cast<int64_t>(chunks[chunk].members.size()) * kPartColumns;
        const int num_left = requests[chunks[chunk].members.front()].seq_len - chunks[chunk].start;
        pieces.push_back({-1, chunk, columns * std::min(num_left, kChunkPositions)});
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
}

void AttentionSchedule::add_runs(int index, const Request& request) {
    for (int token = 0; token < request.num_tokens; token += kTileTokens) {
        runs.push_back({index, token, std::min(kTileTokens, request.num_tokens - token)});
    }
}

}  // namespace pelton
