#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pelton {

namespace {

// Longer than the gaps between operations of a step, shorter than what a host notices: to sleep and wake
// again costs some 60 us.
constexpr auto kSpinTime = std::chrono::microseconds(200);
constexpr int kSpinsPerLook = 32;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `is_done`, or for kSpinTime; returns what `is_done` last said.
template <typename Condition>
bool spin(const Condition& is_done) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    do {
        for (int i = 0; i < kSpinsPerLook; ++i) {
            if (is_done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return is_done();
}

void pin(pthread_t thread, int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread, sizeof(set), &set);  // a refusal costs speed only
#else
    (void)thread;
    (void)cpu;
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads, const std::vector<int>& cpus)
    : num_threads_(num_threads), shares_(num_threads) {
    for (int thread = 1; thread < num_threads; ++thread) {
        threads_.emplace_back([this, thread] { work(thread); });
        if (thread < static_cast<int>(cpus.size())) pin(threads_.back().native_handle(), cpus[thread]);
    }
}

ThreadPool::~ThreadPool() {
    stop_.store(true);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run_job(const Job& job) {
    job_ = job;
    for (int thread = 0; thread < num_threads_; ++thread) {
        const auto first = [&](int64_t index) { return static_cast<int>(index * job.count / num_threads_); };
        shares_[thread].next.store(first(thread), std::memory_order_relaxed);
        shares_[thread].end = first(thread + 1);
    }
    state_.store(kOpen, std::memory_order_release);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    take_tasks(0);
    // Nobody joins any more. Only those who did are waited for: a thread that the system keeps waiting
    // for a core costs the job nothing.
    state_.fetch_and(~kOpen, std::memory_order_acq_rel);
    const auto all_left = [this] { return state_.load(std::memory_order_acquire) == 0; };
    while (!spin(all_left)) std::this_thread::yield();
}

bool ThreadPool::try_join() {
    uint32_t state = state_.load(std::memory_order_relaxed);
    while (state & kOpen) {
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
    }
    return false;
}

void ThreadPool::take_tasks(int thread) {
    for (int other = 0; other < num_threads_; ++other) {
        Share& share = shares_[(thread + other) % num_threads_];
        for (int i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
            job_.call(job_.context, i, thread);
        }
    }
}

void ThreadPool::work(int thread) {
    uint32_t seen = 0;
    for (;;) {
        spin([&] { return generation_.load(std::memory_order_acquire) != seen; });
        generation_.wait(seen, std::memory_order_acquire);
        seen = generation_.load(std::memory_order_acquire);
        if (stop_.load()) return;
        if (try_join()) {
            take_tasks(thread);
            state_.fetch_sub(1, std::memory_order_release);
        }
    }
}

}  // namespace pelton
