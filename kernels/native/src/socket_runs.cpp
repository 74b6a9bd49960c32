// Scattered memory to and from a socket that never waits. In Python a run is a view in a list, and lists are made anew after each call
// that did a part of one: as much processor time as the bytes of 16 KiB. Here it is an entry of an iovec.
#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "baton_native.h"

namespace {

constexpr int kViews = 1024;                // IOV_MAX
constexpr int64_t kBurstBytes = 1 << 20;    // of one system call: more than a socket buffer holds would be listed twice

template <typename Call>
int carry(char* buffer, int64_t buffer_bytes, const int64_t* runs, int64_t num_runs, int64_t* cursor, Call call) {
  while (true) {
    iovec views[kViews];
    size_t count = 0;
    int64_t room = kBurstBytes, done = cursor[1];
    for (int64_t i = cursor[0]; i < num_runs && count < kViews && room > 0; ++i, done = 0) {
      const int64_t start = runs[2 * i], size = runs[2 * i + 1];
      if (start < 0 || size < 0 || size > buffer_bytes || start > buffer_bytes - size) return -EFAULT;
      const int64_t left = size - done < room ? size - done : room;
      if (left == 0) continue;
      views[count++] = {buffer + start + done, static_cast<size_t>(left)};
      room -= left;
    }
    if (count == 0) return BATON_CARRIED;
    msghdr message = {};
    message.msg_iov = views;
    message.msg_iovlen = count;
    int64_t moved = call(&message);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? static_cast<int>(BATON_WOULD_BLOCK) : -errno;
    if (moved == 0) return BATON_PEER_ENDED;
    while (moved > 0) {
      const int64_t left = runs[2 * cursor[0] + 1] - cursor[1];
      if (moved < left) {
        cursor[1] += moved;
        break;
      }
      moved -= left;
      ++cursor[0];
      cursor[1] = 0;
    }
  }
}

}  // namespace

extern "C" int baton_send_runs(
    int fd, const char* buffer, int64_t buffer_bytes, const int64_t* runs, int64_t num_runs, int64_t* cursor) {
  return carry(const_cast<char*>(buffer), buffer_bytes, runs, num_runs, cursor, [fd](msghdr* message) {
    return sendmsg(fd, message, MSG_DONTWAIT | MSG_NOSIGNAL);
  });
}

extern "C" int baton_receive_runs(int fd, char* buffer, int64_t buffer_bytes, const int64_t* runs, int64_t num_runs, int64_t* cursor) {
  return carry(buffer, buffer_bytes, runs, num_runs, cursor, [fd](msghdr* message) { return recvmsg(fd, message, MSG_DONTWAIT); });
}
