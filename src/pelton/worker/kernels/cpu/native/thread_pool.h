// A pool of pinned threads for one operation at a time. Idle threads spin briefly, then sleep.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace pelton {

class ThreadPool {
public:
    // The caller is thread 0; num_threads - 1 more are started. `cpus` are pinned to in order, if any.
    ThreadPool(int num_threads, const std::vector<int>& cpus);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const { return num_threads_; }

    // Calls task(i, thread) for every i in [0, count), each once. Each thread takes neighbours from a share of its own,
    // in order, and when that is done what is left of others'. Returns when all are done. Tasks must not throw, and
    // results must not depend on who runs them.
    template <typename Task>
    void run(int count, const Task& task) {
        if (count <= 0) return;
        if (num_threads_ == 1 || count == 1) {
            for (int i = 0; i < count; ++i) task(i, 0);
            return;
        }
        const Job job = {[](const void* context, int i, int thread) {
                             (*static_cast<const Task*>(context))(i, thread);
                         },
                         &task, count};
        run_job(job);
    }

    // The same for small tasks: a thread takes some neighbours at a time.
    template <typename Task>
    void run_small(int count, const Task& task) {
        const int num_pieces = std::min(count, num_threads_ * kPiecesPerThread);
        run(num_pieces, [&](int piece, int thread) {
            const int last = static_cast<int>(static_cast<int64_t>(count) * (piece + 1) / num_pieces);
            for (int i = static_cast<int>(static_cast<int64_t>(count) * piece / num_pieces); i < last; ++i) {
                task(i, thread);
            }
        });
    }

    // The same for rows of `size` values each, by the caller alone where they are few: to share out a job takes longer.
    template <typename Task>
    void run_rows(int num_rows, int size, const Task& task) {
        if (static_cast<int64_t>(num_rows) * size >= kWorthSharing) return run_small(num_rows, task);
        for (int row = 0; row < num_rows; ++row) task(row, 0);
    }

private:
    static constexpr int kPiecesPerThread = 8;
    static constexpr int kWorthSharing = 16 * 1024;

    struct Job {
        void (*call)(const void* context, int i, int thread);
        const void* context;
        int count;
    };

    // Neighbours lie together in memory: a long stream of one thread is read up to twice as fast as short ones in turn.
    struct alignas(64) Share {
        std::atomic<int> next{0};
        int end = 0;
    };

    // state_: whether the job may be joined, and how many threads have joined and not left.
    static constexpr uint32_t kOpen = 1u << 31;

    void run_job(const Job& job);
    bool try_join();
    void work(int thread);
    void take_tasks(int thread);

    int num_threads_;
    Job job_{};
    std::vector<Share> shares_;  // of each thread
    alignas(64) std::atomic<uint32_t> state_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    std::atomic<bool> stop_{false};
    std::vector<std::thread> threads_;
};

}  // namespace pelton
