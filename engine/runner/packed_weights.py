"""Packed weights, once a machine: the first worker that needs them packs them, the others map what it packed.

    <directory>/KEY.lock       held (flock) while somebody looks or packs; whoever else wants KEY waits
    <directory>/KEY.PID.FD     process PID has the memory open as its descriptor FD: /proc/PID/fd/FD

The memory is a file without a name (memfd). It goes when the last process that has it ends, however that ends, so nothing is ever left
behind, and its size is bounded by the machine's memory alone. Once it is whole it is sealed: nobody can write it any more, and only
what is sealed is mapped by others. A process killed while it packs leaves a lock the system has released, and nothing to read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.native.library import NativeError, NativeLibrary, load_library

HEADER_BYTES = 4096  # the first page: what this is and of what size; the weights begin with the second
MAGIC = b"baton packed weights 1\n"
LOCK_TIMEOUT_S = 120.0  # another one packs: 2 GB/s of weights on a core, so 240 GB
LOCK_POLL_S = 0.01
_HUGE_BYTES = 2 << 20  # files of whole huge pages
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

Fill = Callable[[int], None]
"""Writes the weights to the address given: `size_bytes` of zeros, which begin a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What came of it, for accounting and `baton status`."""

    size_bytes: int
    is_shared: bool  # this machine holds them once for all workers of the run
    was_packed_here: bool  # by this process; False: by another, of which it is mapped
    note: str = ""  # why they are not shared, where they were to be


class PackedWeights:
    """A mapping of packed weights; `base` is good as long as this object. Read-only where it is shared: a write ends the process."""

    def __init__(self, library: NativeLibrary, data: int, *, mapped_bytes: int, fd: int, announced: Path | None, packed: Packed) -> None:
        self.packed = packed
        self.base = data + HEADER_BYTES
        self._calls = library.calls
        self._data = data
        self._mapped_bytes = mapped_bytes
        self._fd = fd  # kept open: others find the memory by it; -1: private
        self._announced = announced

    def __del__(self) -> None:
        if self._announced is not None:
            with contextlib.suppress(OSError):
                self._announced.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
        self._calls.baton_unmap(self._data, self._mapped_bytes)


def packed_weights(key: str, size_bytes: int, fill: Fill, *, directory: Path | None) -> PackedWeights:
    """Memory that holds what `fill` writes: of another process of this machine that has it under `key`, else filled here.

    key: names everything the bytes depend on; letters and digits. directory: of the run on this machine, only the user's; None: not shared.
    Where sharing fails they are packed for this process alone, and `packed.note` says why.

    Raises:
        What `fill` raises; NativeError: there is no memory.
    """
    library = load_library()
    assert isinstance(library, NativeLibrary), library
    if directory is None:
        return _private(library, size_bytes, fill, note="")
    try:
        return _shared(library, key, size_bytes, fill, directory)
    except OSError as error:
        return _private(library, size_bytes, fill, note=f"weights packed for this worker alone: {error}")


def _private(library: NativeLibrary, size_bytes: int, fill: Fill, *, note: str) -> PackedWeights:
    file_bytes = _file_bytes(size_bytes)
    data = _map(library, -1, file_bytes, is_writable=True)
    packed = Packed(size_bytes=size_bytes, is_shared=False, was_packed_here=True, note=note)
    weights = PackedWeights(library, data, mapped_bytes=file_bytes, fd=-1, announced=None, packed=packed)
    fill(weights.base)
    return weights


def _shared(library: NativeLibrary, key: str, size_bytes: int, fill: Fill, directory: Path) -> PackedWeights:
    directory.mkdir(mode=0o700, exist_ok=True)
    header = _header(key, size_bytes)
    with _locked(directory / f"{key}.lock"):
        fd = _found(directory, key, header, size_bytes)
        was_packed_here = fd is None
        if fd is None:
            fd = _pack(library, header, size_bytes, fill)
        announced = directory / f"{key}.{os.getpid()}.{fd}"
        announced.touch(mode=0o600)
    file_bytes = _file_bytes(size_bytes)
    data = _map(library, fd, file_bytes, is_writable=False)
    packed = Packed(size_bytes=size_bytes, is_shared=True, was_packed_here=was_packed_here)
    return PackedWeights(library, data, mapped_bytes=file_bytes, fd=fd, announced=announced, packed=packed)


def _found(directory: Path, key: str, header: bytes, size_bytes: int) -> int | None:
    """A descriptor of memory that another process holds under `key`; forgets processes that hold none any more."""
    for announced in sorted(directory.glob(f"{key}.*.*")):
        _, pid, number = announced.name.split(".")
        with contextlib.suppress(OSError):
            fd = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
            if _is_whole(fd, header, size_bytes):
                return fd
            os.close(fd)
        announced.unlink(missing_ok=True)
    return None


def _is_whole(fd: int, header: bytes, size_bytes: int) -> bool:
    """Also False for some other file that a later process of the same number has open there."""
    if os.fstat(fd).st_size != _file_bytes(size_bytes) or os.pread(fd, len(header), 0) != header:
        return False
    seals: int = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return seals & _SEALS == _SEALS


def _pack(library: NativeLibrary, header: bytes, size_bytes: int, fill: Fill) -> int:
    """A read-only descriptor of fresh memory, filled and sealed."""
    file_bytes = _file_bytes(size_bytes)
    fd = os.memfd_create("baton-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, file_bytes)
        data = _map(library, fd, file_bytes, is_writable=True)
        try:
            fill(data + HEADER_BYTES)
        finally:
            library.calls.baton_unmap(data, file_bytes)
        os.pwrite(fd, header, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """
    Raises:
        TimeoutError: another process has held the lock for too long.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"another worker of this machine packs for more than {LOCK_TIMEOUT_S:g} s") from None
                time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _map(library: NativeLibrary, fd: int, file_bytes: int, *, is_writable: bool) -> int:
    data: int | None = library.calls.baton_map(fd, file_bytes, is_writable)
    if data is None:
        raise NativeError(library.calls.baton_error().decode())
    return data


def _header(key: str, size_bytes: int) -> bytes:
    assert key.isalnum(), f"key {key!r}"
    return MAGIC + f"{key} {size_bytes}\n".encode()


def _file_bytes(size_bytes: int) -> int:
    return -(-(HEADER_BYTES + size_bytes) // _HUGE_BYTES) * _HUGE_BYTES


__all__ = ["Packed", "PackedWeights", "packed_weights"]
