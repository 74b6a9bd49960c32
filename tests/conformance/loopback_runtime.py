"""A device without a GPU: kvtransfer.cuda_runtime.DeviceRuntime over shared memory, whose copies end on a thread of their stream.

What it shares with the real one is what kvtransfer.cuda_ipc leans on: another process opens an allocation by a handle, and once only;
a copy is begun by one call and ends at some later time, in the order of its stream; an event tells. What lies outside an allocation is
refused, as is a call from a thread that did not enter.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np

from kernels.copy_runs import Runs
from kvtransfer.cuda_runtime import HANDLE_BYTES, DeviceError
from kvtransfer.mapping import map_aligned


@dataclass(eq=False)
class _Memory:
    view: memoryview
    size_bytes: int
    fd: int = -1
    handle: bytes = b""  # not empty: another process' allocation


@dataclass(eq=False)
class _Stream:
    work: queue.Queue[tuple[str, object] | None] = field(default_factory=queue.Queue)
    thread: threading.Thread | None = None


class LoopbackRuntime:
    """`gate`: while it is clear, copies that were begun do not go on. `pace_s`: how long each slice of copies takes at least."""

    def __init__(self, device_id: str = "loopback:0", *, pace_s: float = 0.0) -> None:
        self.device_id = device_id
        self.gate = threading.Event()
        self.gate.set()
        self.pace_s = pace_s
        self.num_opened = 0
        self.num_copies_begun = 0
        self.copied_bytes = 0
        self.failing: set[str] = set()  # names of calls that fail from now on
        self._entered = threading.local()
        self._lock = threading.Lock()
        self._memory: dict[int, _Memory] = {}
        self._host: dict[int, ctypes.Array[ctypes.c_ubyte]] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, threading.Event] = {}
        self._names = iter(range(1, 1 << 62))

    def enter(self) -> None:
        self._entered.yes = True

    def allocate(self, size_bytes: int) -> int:
        self._check("allocate")
        fd = os.memfd_create("baton-kv-device", os.MFD_CLOEXEC)
        os.ftruncate(fd, size_bytes)
        return self._keep(_Memory(map_aligned(fd, size_bytes, writable=True), size_bytes, fd=fd))

    def free(self, address: int) -> None:
        self._check("free")
        os.close(self._memory.pop(address).fd)

    def allocate_host(self, size_bytes: int) -> int:
        self._check("allocate_host")
        memory = (ctypes.c_ubyte * size_bytes)()
        self._host[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free_host(self, address: int) -> None:
        del self._host[address]

    def export(self, address: int) -> bytes:
        self._check("export")
        memory = self._memory[address]
        return f"{os.getpid()}/{memory.fd}/{memory.size_bytes}/".encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, handle: bytes) -> int:
        self._check("open")
        if any(memory.handle == handle for memory in self._memory.values()):
            raise DeviceError("open", 208, "already mapped")
        pid, fd, size = handle.split(b"/")[:3]
        try:
            opened = os.open(f"/proc/{int(pid)}/fd/{int(fd)}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            raise DeviceError("open", 201, "invalid context") from None
        view = map_aligned(opened, int(size), writable=True)
        os.close(opened)
        self.num_opened += 1
        return self._keep(_Memory(view, int(size), handle=handle))

    def close(self, address: int) -> None:
        self._check("close")
        assert self._memory[address].handle, "not an allocation of another process"
        del self._memory[address]

    def create_stream(self) -> int:
        self._check("create_stream")
        stream = _Stream()
        stream.thread = threading.Thread(target=self._run, args=(stream,), name="kv-loopback-stream", daemon=True)
        stream.thread.start()
        name = next(self._names)
        self._streams[name] = stream
        return name

    def destroy_stream(self, stream: int) -> None:
        self._check("destroy_stream")
        ended = self._streams.pop(stream)
        assert ended.work.unfinished_tasks == 0, "copies are under way on the stream"
        ended.work.put(None)
        assert ended.thread is not None
        ended.thread.join()

    def copy_runs(self, source: int, target: int, runs: Runs, stream: int) -> None:
        self._check("copy_runs")
        for base, column in ((source, 0), (target, 1)):
            with self._lock:
                memory = self._memory.get(base)
            if memory is not None and len(runs) and int((runs[:, column] + runs[:, 2]).max()) > memory.size_bytes:
                raise DeviceError("copy_runs", 1, "invalid value")
        self.num_copies_begun += len(runs)
        self.copied_bytes += int(runs[:, 2].sum())
        self._streams[stream].work.put(("copy", (source, target, np.array(runs))))

    def copy_on_device(self, source: int, target: int, runs: Runs, stream: int) -> None:
        self.copy_runs(source, target, runs, stream)

    def record(self, stream: int) -> int:
        self._check("record")
        name = next(self._names)
        self._events[name] = threading.Event()
        self._streams[stream].work.put(("event", self._events[name]))
        return name

    def is_done(self, event: int) -> bool:
        self._check("is_done")
        return self._events[event].is_set()

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def synchronize(self, stream: int) -> None:
        self._check("synchronize")
        self._streams[stream].work.join()

    @property
    def num_open(self) -> int:
        """Allocations of other processes that are open."""
        return sum(bool(memory.handle) for memory in self._memory.values())

    @property
    def is_idle(self) -> bool:
        """No copy is under way."""
        return all(not stream.work.unfinished_tasks for stream in self._streams.values())

    def _keep(self, memory: _Memory) -> int:
        address: int = np.frombuffer(memory.view, dtype=np.uint8).ctypes.data
        with self._lock:
            self._memory[address] = memory
        return address

    def _check(self, call: str) -> None:
        assert getattr(self._entered, "yes", False), f"{call} from a thread that did not enter the device"
        if call in self.failing:
            raise DeviceError(call, 719, "launch failure")

    def _run(self, stream: _Stream) -> None:
        while (work := stream.work.get()) is not None:
            what, argument = work
            if isinstance(argument, threading.Event):
                argument.set()
            else:
                assert what == "copy" and isinstance(argument, tuple)
                self.gate.wait()
                time.sleep(self.pace_s)
                source, target, runs = argument
                for from_offset, to_offset, size in runs.tolist():
                    ctypes.memmove(target + to_offset, source + from_offset, size)
            stream.work.task_done()
