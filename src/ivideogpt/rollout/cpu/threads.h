// Barrier: where the threads of a call wait for one another. It spins for a moment, then sleeps.
//
// A decode step meets some fifty barriers, so nothing may be slow in one. The runtime's own spins for milliseconds:
// where other processes want the cores too, that keeps the thread that is waited for from running.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

class Barrier {
 public:
  void wait(int32_t size) {
    const int32_t now = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(now + 1);  // in one order with `asleep_` and the test before sleep, so that none is left behind
      if (asleep_.load()) wake();
      return;
    }
    for (int32_t round = 0; round < ROUNDS; round++)
      for (int32_t i = 0; i < 32; i++) {
        if (phase_.load(std::memory_order_acquire) != now) return;
        pause();
      }
    asleep_.fetch_add(1);
    while (phase_.load() == now) sleep(now);
    asleep_.fetch_sub(1);
  }

 private:
  static constexpr int32_t ROUNDS = 64;  // of 32 pauses: some 40 to 120 microseconds, above the usual unevenness

  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");  // `yield` does nothing on most of them
#endif
  }
#if defined(__linux__)
  void sleep(int32_t now) { syscall(SYS_futex, &phase_, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0); }
  void wake() { syscall(SYS_futex, &phase_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }
#else
  void sleep(int32_t) { std::this_thread::yield(); }
  void wake() {}
#endif
  alignas(64) std::atomic<int32_t> arrived_{0};
  alignas(64) std::atomic<int32_t> phase_{0};
  std::atomic<int32_t> asleep_{0};
};

// A thread's place among those of a call, and its share of what they divide.
struct Team {
  int64_t member, size;
  Barrier* barrier;
  int64_t begin(int64_t items) const { return items * member / size; }
  int64_t end(int64_t items) const { return items * (member + 1) / size; }
  void meet() const {
    if (size > 1) barrier->wait(static_cast<int32_t>(size));
  }
};
