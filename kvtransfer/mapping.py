"""Mappings of a file that begin where a huge page may begin.

Python's mmap takes whatever address the system gives, and a page of 2 MiB can stand only where address and offset in the file agree.
Attention over a large pool, and copies of its scattered blocks, wait for page walks otherwise (20 % and more: docs/operating.md).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

HUGE_PAGE_BYTES = 2 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman.h, from 5.14 on; faults pages in and leaves their content alone
_MADV_COLLAPSE = 25  # from 6.1 on; makes one page of many, content and all, also where shmem_enabled is "never"
_PROT_NONE, _MAP_FIXED, _MAP_NORESERVE = 0, 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)  # a call releases the interpreter lock, which mmap.madvise would hold
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_aligned(fd: int, size_bytes: int, *, writable: bool) -> memoryview:
    """The first `size_bytes` of `fd`, shared with all who map it. Unmapped when the last view of it is gone.

    Raises:
        OSError: the system refuses.
    """
    # Reserve a huge page more than is needed, lay the file over the aligned part, give the ends back.
    length = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    reserved = _mmap(None, length + HUGE_PAGE_BYTES, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)
    address = -(-reserved // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    try:
        _mmap(address, length, protection, mmap.MAP_SHARED | _MAP_FIXED, fd)
    except OSError:
        _libc.munmap(reserved, length + HUGE_PAGE_BYTES)
        raise
    if address > reserved:
        _libc.munmap(reserved, address - reserved)
    if (after := reserved + HUGE_PAGE_BYTES - address) > 0:
        _libc.munmap(address + length, after)
    memory = (ctypes.c_ubyte * size_bytes).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, length)  # views hold `memory`
    view = memoryview(memory).cast("B")
    return view if writable else view.toreadonly()


def make_resident(address: int, size_bytes: int) -> str:
    """Take the memory of a mapping's pages now, in huge pages where they fit; what is written there stays. Why not, or "".

    The range lies inside one writable mapping; `address` and `size_bytes` are those of whole pages.
    """
    is_huge = address % HUGE_PAGE_BYTES == 0 and size_bytes == HUGE_PAGE_BYTES
    # Collapsing wants one page to be there; the rest of it need never have been.
    if (
        is_huge
        and not _libc.madvise(address, mmap.PAGESIZE, _MADV_POPULATE_WRITE)
        and not _libc.madvise(address, size_bytes, _MADV_COLLAPSE)
    ):
        return ""
    if _libc.madvise(address, size_bytes, _MADV_POPULATE_WRITE) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def _mmap(address: int | None, length: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, length, protection, flags, fd, 0)
    if mapped is None or mapped == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(mapped)
