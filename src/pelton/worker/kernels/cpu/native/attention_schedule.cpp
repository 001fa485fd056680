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

// A chunk that requests may have in common.
struct SharedChunk {
    int num_readers = 0;
    int chunk = -1;  // that may take one more member
};

}  // namespace

AttentionSchedule::AttentionSchedule(const AttentionShape& shape, std::span<const Request> requests, int chunk_threads) {
    const int group = shape.num_heads / shape.num_kv_heads;
    const auto may_be_cut = [&](const Request& request) {
        return chunk_threads > 0 && request.num_tokens * group <= kPartColumns && request.seq_len > kChunkPositions;
    };
    int64_t num_positions = 0;
    std::map<std::pair<int, std::vector<int64_t>>, SharedChunk> known;  // by start and key
    std::vector<std::vector<SharedChunk*>> common(requests.size());     // of each request, from its first chunk on
    for (size_t index = 0; index < requests.size(); ++index) {
        const Request& request = requests[index];
        num_positions += request.seq_len;
        if (!may_be_cut(request) || shape.sliding_window > 0) continue;
        const int num_seen = request.seq_len - request.num_tokens + 1;  // by all of its columns
        for (int start = 0; start + kChunkPositions <= num_seen; start += kChunkPositions) {
            common[index].push_back(&known[{start, sharing_key(shape, request, start)}]);
            ++common[index].back()->num_readers;
        }
    }
    // Among many, one that shares nothing is as well taken as a whole: its queries are loaded once, its results merged as
    // they come.
    const auto stays_whole = [&](int index) {
        const int64_t own = static_cast<int64_t>(requests[index].seq_len) * chunk_threads * kTasksPerThread;
        return own <= num_positions * shape.num_kv_heads &&
               std::ranges::none_of(common[index], [](const SharedChunk* chunk) { return chunk->num_readers > 1; });
    };
    std::vector<std::pair<int, int>> places;  // chunk and member, of the merges' parts
    for (int index = 0; index < static_cast<int>(requests.size()); ++index) {
        const Request& request = requests[index];
        if (!may_be_cut(request) || stays_whole(index)) {
            add_runs(index, request);
            continue;
        }
        const int first_position = request.seq_len - request.num_tokens;
        const int first = shape.sliding_window > 0 ? std::max(0, first_position - shape.sliding_window + 1) : 0;
        merges.push_back({index, {}});
        size_t num_cut = 0;
        for (int start = first / kChunkPositions * kChunkPositions; start < request.seq_len; start += kChunkPositions) {
            int chunk = static_cast<int>(chunks.size());
            if (num_cut < common[index].size()) {
                int& open = common[index][num_cut++]->chunk;
                if (open < 0 || chunks[open].members.size() == kMaxMembers) open = chunk;
                chunk = open;
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
        num_positions_read += positions;
        pieces.push_back({run, -1, runs[run].num_tokens * group * positions});
        num_columns = std::max(num_columns, runs[run].num_tokens * group);
    }
    for (int chunk = 0; chunk < static_cast<int>(chunks.size()); ++chunk) {
        const int64_t columns = static_cast<int64_t>(chunks[chunk].members.size()) * kPartColumns;
        const int positions =
            std::min(requests[chunks[chunk].members.front()].seq_len - chunks[chunk].start, kChunkPositions);
        num_positions_read += positions;
        pieces.push_back({-1, chunk, columns * positions});
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
}

void AttentionSchedule::add_runs(int index, const Request& request) {
    for (int token = 0; token < request.num_tokens; token += kTileTokens) {
        runs.push_back({index, token, std::min(kTileTokens, request.num_tokens - token)});
    }
}

}  // namespace pelton
