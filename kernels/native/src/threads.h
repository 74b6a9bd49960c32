// A few threads for the loops of one network. The caller works too and never waits for a thread that has claimed nothing, so a
// core taken away by another process costs at most the piece that was being computed on it.
#pragma once
#include <stdint.h>

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace baton {

class Threads {
 public:
  explicit Threads(int num_threads);  // the caller included
  ~Threads();
  int size() const { return size_; }

  // body(thread, i) for every i in [0, count), each once. Each thread begins with its own share of neighbouring pieces and then
  // helps the others with theirs.
  template <typename Body>
  void each(int64_t count, const Body& body) {
    if (size_ == 1 || count < 2) {
      for (int64_t i = 0; i < count; ++i) body(0, i);
      return;
    }
    run(count, [](const void* b, int thread, int64_t i) { (*static_cast<const Body*>(b))(thread, i); }, &body);
  }

  // The same for work of single rows, a few of which are not worth another thread.
  template <typename Body>
  void each_row(int64_t num_rows, const Body& body) {
    if (num_rows > kRowsInline) return each(num_rows, body);
    for (int64_t row = 0; row < num_rows; ++row) body(0, row);
  }

 private:
  static constexpr int64_t kRowsInline = 4;

  typedef void (*Call)(const void* body, int thread, int64_t i);
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  void run(int64_t count, Call call, const void* body);
  void serve(int thread);
  void work(int thread);
  bool wait_for_job(uint32_t seen, uint32_t* job);

  int size_;
  std::unique_ptr<Share[]> shares_;
  Call call_ = nullptr;
  const void* body_ = nullptr;
  alignas(64) std::atomic<uint32_t> state_{0};     // 2 * job + (1: open); kStop ends the threads
  alignas(64) std::atomic<uint32_t> inside_{0};    // threads that may be looking at the job
  alignas(64) std::atomic<uint32_t> sleeping_{0};  // threads that need a wake
  std::atomic<uint32_t> caller_sleeps_{0};
  std::vector<std::thread> threads_;
};

}  // namespace baton
