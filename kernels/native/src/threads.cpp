#include "threads.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace baton {

namespace {

constexpr uint32_t kStop = 0xffffffffu;
constexpr int64_t kSpinNs = 50'000;  // about the gap between two steps of a small model; then sleep

void sleep_while(std::atomic<uint32_t>* word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(std::atomic<uint32_t>* word) { syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Whether `happened` came true within kSpinNs.
template <typename Condition>
bool spin(const Condition& happened) {
  for (int i = 0; i < 64; ++i) {
    if (happened()) return true;
    pause();
  }
  const int64_t end = now_ns() + kSpinNs;
  do {
    for (int i = 0; i < 64; ++i) {
      if (happened()) return true;
      pause();
    }
  } while (now_ns() < end);
  return happened();
}

}  // namespace

Threads::Threads(int num_threads) : size_(num_threads), shares_(new Share[num_threads]) {
  for (int i = 1; i < size_; ++i) threads_.emplace_back([this, i] { serve(i); });
}

Threads::~Threads() {
  state_.store(kStop);
  wake(&state_);
  for (auto& thread : threads_) thread.join();
}

void Threads::run(int64_t count, Call call, const void* body) {
  for (int i = 0; i < size_; ++i) {
    shares_[i].next.store(count * i / size_, std::memory_order_relaxed);
    shares_[i].end = count * (i + 1) / size_;
  }
  call_ = call;
  body_ = body;
  // Skips the values around kStop: 2^31 jobs are a week of steps.
  uint32_t open = (state_.load(std::memory_order_relaxed) + 2) | 1u;
  if (open >= kStop - 4) open = 1;
  state_.store(open);
  if (sleeping_.load()) wake(&state_);
  work(0);
  // Every piece is claimed. Close the door, then wait for those who claimed some.
  state_.store(open & ~1u);
  auto is_empty = [this] { return inside_.load() == 0; };
  if (spin(is_empty)) return;
  caller_sleeps_.store(1);
  for (uint32_t left; (left = inside_.load()) != 0;) sleep_while(&inside_, left);
  caller_sleeps_.store(0);
}

void Threads::work(int thread) {
  for (int turn = 0; turn < size_; ++turn) {
    Share& share = shares_[(thread + turn) % size_];
    const int64_t end = share.end;
    while (share.next.load(std::memory_order_relaxed) < end) {
      int64_t i = share.next.fetch_add(1, std::memory_order_relaxed);
      if (i < end) call_(body_, thread, i);
    }
  }
}

void Threads::serve(int thread) {
  uint32_t seen = 0;
  while (wait_for_job(seen, &seen)) {
    inside_.fetch_add(1);
    if (state_.load() == seen) work(thread);
    if (inside_.fetch_sub(1) == 1 && caller_sleeps_.load()) wake(&inside_);
  }
}

bool Threads::wait_for_job(uint32_t seen, uint32_t* job) {
  uint32_t state = 0;
  auto is_open = [&] {
    state = state_.load(std::memory_order_acquire);
    return state == kStop || ((state & 1u) && state != seen);
  };
  while (!spin(is_open)) {
    sleeping_.fetch_add(1);
    if (!is_open()) sleep_while(&state_, state);
    sleeping_.fetch_sub(1);
  }
  *job = state;
  return state != kStop;
}

}  // namespace baton
