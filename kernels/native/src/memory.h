// Memory in huge pages where the system gives them, private or of a file that other processes map too.
#pragma once
#include <stddef.h>

namespace baton {

// The whole of `fd` (or zeroed private memory: -1), in huge pages where it can be; throws std::runtime_error. Mapped writable, the
// memory of a file is taken at once.
void* map_memory(int fd, size_t bytes, bool is_writable);
void unmap_memory(void* data, size_t bytes);

// Zeroed private memory; `reserve` keeps nothing of the content.
class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { reserve(bytes); }
  Memory(Memory&& other) noexcept : data_(other.data_), bytes_(other.bytes_) { other.data_ = nullptr, other.bytes_ = 0; }
  Memory& operator=(Memory&&) = delete;
  ~Memory();
  void reserve(size_t bytes);
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace baton
