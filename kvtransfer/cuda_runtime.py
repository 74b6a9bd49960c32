"""The few calls of the CUDA runtime that moving blocks between two processes of one GPU needs, through ctypes.

Not through torch: a transfer thread wants a stream, an event and a handle, and the workers that need none of it must not load CUDA.
`DeviceRuntime` is what kvtransfer.cuda_ipc asks for; the tests bring a second one over ordinary shared memory, whose copies also end
on another thread than the one that began them.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from typing import Protocol

from kernels.copy_runs import Runs
from kernels.copy_runs.device import DeviceCopy, DriverError, fits
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

HANDLE_BYTES = 64  # cudaIpcMemHandle_t

# driver_types.h and cuda_runtime_api.h; unchanged from CUDA 11 to 13.
_SUCCESS = 0
_NOT_READY = 600
_LAZY_ENABLE_PEER_ACCESS = 1
_MEMCPY_DEFAULT = 4  # the driver tells host from device by the address
_STREAM_NON_BLOCKING = 1  # does not wait for the legacy default stream
_EVENT_DISABLE_TIMING = 2
_BUS_ID_BYTES = 32
_REMEDY = "install a torch built for CUDA (or the package nvidia-cuda-runtime) on a machine with an NVIDIA GPU, or choose kv_transport auto"


class DeviceError(Exception):
    """The device refused, or broke down. `code` is the runtime's own."""

    def __init__(self, call: str, code: int, name: str) -> None:
        super().__init__(f"{call}: {name} ({code})")
        self.call = call
        self.code = code
        self.name = name


class DeviceRuntime(Protocol):
    """Memory, streams and events of one device. Addresses, streams and events are integers; every call may raise DeviceError.

    Calls may come from any thread that has called `enter`.
    """

    device_id: str  # of two processes of one host equal exactly when they use one device

    def enter(self) -> None:
        """The calling thread works with this device from here on."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Zeroed device memory, an allocation of its own."""
        ...

    def free(self, address: int) -> None: ...

    def allocate_host(self, size_bytes: int) -> int:
        """Host memory that the device copies to at full speed."""
        ...

    def free_host(self, address: int) -> None: ...

    def export(self, address: int) -> bytes:
        """HANDLE_BYTES by which another process opens the allocation that begins at `address`."""
        ...

    def open(self, handle: bytes) -> int:
        """Where another process' allocation begins in ours. A handle that is open must be closed before it is opened again."""
        ...

    def close(self, address: int) -> None:
        """What `open` returned. No copy from it may be under way."""
        ...

    def create_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None:
        """No copy may be under way on it."""
        ...

    def copy_runs(self, source: int, target: int, runs: Runs, stream: int) -> None:
        """Begin to copy runs [num_runs, 3] int64 of (source offset, target offset, size) in bytes; either side host or device."""
        ...

    def copy_on_device(self, source: int, target: int, runs: Runs, stream: int) -> None:
        """The same with both sides on the device, where many runs cost little more than one."""
        ...

    def record(self, stream: int) -> int:
        """An event that is done when everything begun on the stream so far has ended."""
        ...

    def is_done(self, event: int) -> bool: ...

    def destroy_event(self, event: int) -> None: ...

    def synchronize(self, stream: int) -> None:
        """Wait until nothing is under way on the stream; without a bound, as the device has none."""
        ...


class CudaRuntime:
    """`DeviceRuntime` of one NVIDIA GPU."""

    def __init__(self, device_index: int = 0) -> None:
        """
        Raises:
            ConfigError: no CUDA runtime or no such GPU here; says what to do.
        """
        self._cuda = _load()
        self._device_index = device_index
        count = ctypes.c_int(0)
        code = self._cuda.cudaGetDeviceCount(ctypes.byref(count))
        if code != _SUCCESS:
            raise ConfigError(f"cuda_ipc needs an NVIDIA GPU, the CUDA runtime says {self._name(code)} ({code}); {_REMEDY}")
        if device_index >= count.value:
            raise ConfigError(f"GPU {device_index} is asked for, this process sees {count.value}; set CUDA_VISIBLE_DEVICES or the index")
        bus_id = ctypes.create_string_buffer(_BUS_ID_BYTES)
        self._call("cudaDeviceGetPCIBusId", bus_id, _BUS_ID_BYTES, device_index)
        self.device_id = f"cuda:{bus_id.value.decode().lower()}"
        self._loading = threading.Lock()
        self._kernel: DeviceCopy | None = None
        self._has_kernel: bool | None = None  # None: nobody has asked

    def enter(self) -> None:
        self._call("cudaSetDevice", self._device_index)

    def allocate(self, size_bytes: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), size_bytes)
        assert address.value is not None, "an allocation at address 0"
        self._call("cudaMemset", address, 0, size_bytes)
        self.synchronize(0)
        return address.value

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def allocate_host(self, size_bytes: int) -> int:
        address = ctypes.c_void_p()
        self._call("cudaMallocHost", ctypes.byref(address), size_bytes)
        assert address.value is not None, "an allocation at address 0"
        return address.value

    def free_host(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def export(self, address: int) -> bytes:
        handle = _MemHandle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        given = _MemHandle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), given, _LAZY_ENABLE_PEER_ACCESS)
        assert address.value is not None, "an allocation at address 0"
        return address.value

    def close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", address)

    def create_stream(self) -> int:
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", stream)

    def copy_runs(self, source: int, target: int, runs: Runs, stream: int) -> None:
        copy = self._cuda.cudaMemcpyAsync
        for from_offset, to_offset, size in runs.tolist():
            code = copy(target + to_offset, source + from_offset, size, _MEMCPY_DEFAULT, stream)
            if code != _SUCCESS:
                raise DeviceError("cudaMemcpyAsync", code, self._name(code))

    def copy_on_device(self, source: int, target: int, runs: Runs, stream: int) -> None:
        kernel = self._copy_kernel()
        if kernel is None or not fits(source, target, runs):
            self.copy_runs(source, target, runs, stream)
            return
        try:
            kernel.begin(source, target, runs, stream)
        except DriverError as error:
            raise DeviceError(error.call, error.code, "the driver refuses") from error

    def record(self, stream: int) -> int:
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), _EVENT_DISABLE_TIMING)
        assert event.value is not None, "an event at address 0"
        self._call("cudaEventRecord", event, stream)
        return event.value

    def is_done(self, event: int) -> bool:
        code: int = self._cuda.cudaEventQuery(event)
        if code not in (_SUCCESS, _NOT_READY):
            raise DeviceError("cudaEventQuery", code, self._name(code))
        return code == _SUCCESS

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", event)

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", stream)

    def _copy_kernel(self) -> DeviceCopy | None:
        """Loaded when the first copy needs it; None where the driver does not take it, and copies go one by one."""
        with self._loading:
            if self._has_kernel is None:
                try:
                    self._kernel = DeviceCopy()
                except (OSError, DriverError) as error:
                    log.warning("blocks are copied one by one: the driver takes no kernel", extra={"reason": str(error)})
                self._has_kernel = self._kernel is not None
            return self._kernel

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code != _SUCCESS:
            raise DeviceError(name, code, self._name(code))

    def _name(self, code: int) -> str:
        text: bytes | None = self._cuda.cudaGetErrorName(code)
        return text.decode() if text else "unknown error"


class _MemHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES = {
    "cudaGetDeviceCount": (_POINTER,),
    "cudaDeviceGetPCIBusId": (ctypes.c_char_p, _INT, _INT),
    "cudaSetDevice": (_INT,),
    "cudaMalloc": (_POINTER, _SIZE),
    "cudaMemset": (_POINTER, _INT, _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMallocHost": (_POINTER, _SIZE),
    "cudaFreeHost": (_POINTER,),
    "cudaIpcGetMemHandle": (_POINTER, _POINTER),
    "cudaIpcOpenMemHandle": (_POINTER, _MemHandle, ctypes.c_uint),
    "cudaIpcCloseMemHandle": (_POINTER,),
    "cudaStreamCreateWithFlags": (_POINTER, ctypes.c_uint),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaEventCreateWithFlags": (_POINTER, ctypes.c_uint),
    "cudaEventRecord": (_POINTER, _POINTER),
    "cudaEventQuery": (_POINTER,),
    "cudaEventDestroy": (_POINTER,),
}


def _load() -> ctypes.CDLL:
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int
        library.cudaGetErrorName.argtypes = (ctypes.c_int,)
        library.cudaGetErrorName.restype = ctypes.c_char_p
        return library
    raise ConfigError(f"cuda_ipc needs the CUDA runtime, and no libcudart was found; {_REMEDY}")


def _candidates() -> Iterator[str]:
    """What torch brought along first: it fits the driver that torch runs on. Torch itself is not imported for it."""
    for package, patterns in (("nvidia", ("*/lib/libcudart.so.*",)), ("torch", ("lib/libcudart*.so*",))):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for pattern in patterns:
                yield from sorted(glob.glob(os.path.join(glob.escape(folder), pattern)), reverse=True)
    yield from ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
