#include "memory.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include <new>
#include <stdexcept>
#include <string>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1
#endif

namespace baton {

namespace {

constexpr size_t kHuge = size_t{2} << 20;

// Files get huge pages by advice only where an administrator has switched that on (shmem_enabled); collapsing is allowed everywhere.
// A piece that holds one page becomes a huge one at the price of zeroing it, so this comes before anything is written.
void collapse(char* data, size_t bytes) {
  for (size_t at = 0; at + kHuge <= bytes; at += kHuge) {
    reinterpret_cast<volatile char*>(data)[at] = 0;
    if (madvise(data + at, kHuge, MADV_COLLAPSE) && errno == EINVAL) return;  // this kernel cannot
  }
}

}  // namespace

void* map_memory(int fd, size_t bytes, bool is_writable) {
  // One huge page more than asked for, so that a part of it is aligned; the ends are given back.
  const size_t spare = bytes >= kHuge ? kHuge : 0;
  char* reserved = static_cast<char*>(mmap(nullptr, bytes + spare, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (reserved == MAP_FAILED) throw std::bad_alloc();
  const size_t before = spare ? (kHuge - reinterpret_cast<uintptr_t>(reserved) % kHuge) % kHuge : 0;
  char* data = reserved + before;
  const int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
  if (mmap(data, bytes, is_writable ? PROT_READ | PROT_WRITE : PROT_READ, flags | MAP_FIXED, fd, 0) == MAP_FAILED) {
    const std::string reason = strerror(errno);
    munmap(reserved, bytes + spare);
    throw std::runtime_error("cannot map " + std::to_string(bytes) + " bytes: " + reason);
  }
  if (before) munmap(reserved, before);
  if (before < spare) munmap(data + (bytes + 4095) / 4096 * 4096, spare - before);
  if (fd < 0 && bytes >= kHuge) madvise(data, bytes, MADV_HUGEPAGE);
  if (fd >= 0 && is_writable) collapse(data, bytes);
  return data;
}

void unmap_memory(void* data, size_t bytes) { munmap(data, bytes); }

Memory::~Memory() {
  if (data_) unmap_memory(data_, bytes_);
}

void Memory::reserve(size_t bytes) {
  if (bytes <= bytes_) return;
  if (bytes >= kHuge) bytes = (bytes + kHuge - 1) / kHuge * kHuge;
  if (data_) unmap_memory(data_, bytes_);
  data_ = nullptr, bytes_ = 0;
  data_ = map_memory(-1, bytes, true), bytes_ = bytes;
}

}  // namespace baton
