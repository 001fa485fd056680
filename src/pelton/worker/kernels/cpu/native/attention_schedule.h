// How a step's attention is cut into pieces that threads take one by one.
//
// A request is cut into runs of its new tokens, each over all positions. Where kernels take columns, one with few
// new tokens, a decode, may be cut into chunks of positions instead: a long context is shared out among threads, and a
// chunk that requests have in common (a shared prefix) is read once for all of them. Either way a column's result
// is the same to the bit.
#pragma once

#include <span>
#include <vector>

#include "attention.h"

namespace pelton {

constexpr int kChunkPositions = 256;
constexpr int kPartColumns = 16;
// That each thread should find, so that what is left over at the end is short.
constexpr int kTasksPerThread = 8;

class AttentionSchedule {
public:
    struct Request {
        int num_tokens;
        int seq_len;
        const int64_t* block_table;
    };
    // Tokens of one request.
    struct Run {
        int request;
        int first_token;
        int num_tokens;
    };
    // One chunk of positions for the requests `members`, all with as many columns.
    struct Chunk {
        int start;
        int first_tile;  // of its parts
        std::vector<int> members;
    };
    // A request's chunks in order.
    struct Merge {
        struct Part {
            int tile;
            int lane;
        };
        int request;
        std::vector<Part> parts;
    };
    // Of `runs` (chunk < 0) or `chunks`.
    struct Piece {
        int run;
        int chunk;
        int64_t cost;
    };

    AttentionSchedule() = default;
    // chunk_threads: that share out the work, or 0 where kernels do not take columns.
    AttentionSchedule(const AttentionShape& shape, std::span<const Request> requests, int chunk_threads);

    std::vector<Run> runs;
    std::vector<Chunk> chunks;
    std::vector<Merge> merges;
    std::vector<Piece> pieces;  // longest first: what is left over at the end is short
    int num_tiles = 0;          // of parts, for one key-value head
    int num_columns = 0;        // of one piece, at most
    int64_t num_positions_read = 0;  // by all pieces, windows left out of account

private:
    void add_runs(int index, const Request& request);
};

}  // namespace pelton
