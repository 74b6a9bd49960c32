"""Choosing the path of a pull: on the device or in shared memory where the peer proves to be on this host, else TCP; and why.

The proof is a file only this host has: each endpoint writes a random nonce into its run directory and offers
"path#boot_id:nonce". A peer that runs under the same kernel (boot_id) and reads the same nonce at that path shares host and file
system with it. Host names prove nothing (containers share and repeat them), and neither would the nonce alone on a network disk.
A pool in device memory is read by peers on the same device only. The device's name says which; since two hosts may give one name to
two devices, the proof comes first.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from functools import cache

from protocol.kv import Endpoint

_BOOT_ID_PATH = "/proc/sys/kernel/random/boot_id"
_NONCE_BYTES_MAX = 256
_MAX_PROVED = 1024
_proved: set[str] = set()  # nonces that were read here


class PathReason(Enum):
    """Why a path was taken; the label of a counter."""

    CONFIGURED = "configured"
    SAME_HOST = "same_host"
    SAME_DEVICE = "same_device"  # and the same host
    OTHER_DEVICE = "other_device"  # on the same host
    NO_NONCE = "no_nonce"  # the peer offers no proof (it has no shared memory to offer)
    OTHER_HOST = "other_host"  # another kernel
    NONCE_UNREADABLE = "nonce_unreadable"  # the same kernel, but not the same files: another container
    NONCE_DIFFERS = "nonce_differs"  # a leftover file
    RETRY = "retry"  # the other path failed
    NOT_OFFERED = "not_offered"  # the peer offers no path we may take


@dataclass(frozen=True, slots=True, kw_only=True)
class PathChoice:
    path: str | None  # None: no path
    reason: PathReason


def choose_path(policy: str, endpoint: Endpoint, *, tried: Collection[str] = (), device_id: str = "") -> PathChoice:
    """The path for a pull under `kv_transport` = `policy`, leaving out those already tried.

    `device_id` is that of our pool's memory; empty: it is the host's, and no device is read or written.
    """
    offered = {
        "shm": bool(endpoint.unix_path),
        "cuda_ipc": bool(endpoint.cuda_path),
        "tcp": bool(endpoint.port),
        "ucx": bool(endpoint.ucx_port),
        "nccl": bool(endpoint.nccl_port),
        "local": True,
    }
    if policy != "auto":
        if offered[policy] and policy not in tried:
            return PathChoice(path=policy, reason=PathReason.CONFIGURED)
        return PathChoice(path=None, reason=PathReason.NOT_OFFERED)
    reason = host_proof(endpoint)
    if device_id:
        return _choose_on_device(endpoint, device_id, reason, tried)
    if reason is PathReason.SAME_HOST and offered["shm"] and "shm" not in tried:
        return PathChoice(path="shm", reason=reason)
    if offered["tcp"] and "tcp" not in tried:
        return PathChoice(path="tcp", reason=PathReason.RETRY if tried else reason)
    return PathChoice(path=None, reason=PathReason.NOT_OFFERED)


def _choose_on_device(endpoint: Endpoint, device_id: str, reason: PathReason, tried: Collection[str]) -> PathChoice:
    if not endpoint.cuda_path or "cuda_ipc" in tried:
        return PathChoice(path=None, reason=PathReason.NOT_OFFERED)
    if reason is not PathReason.SAME_HOST:
        return PathChoice(path=None, reason=reason)
    if endpoint.cuda_device != device_id:
        return PathChoice(path=None, reason=PathReason.OTHER_DEVICE)
    return PathChoice(path="cuda_ipc", reason=PathReason.SAME_DEVICE)


def write_nonce(path: str) -> str:
    """Create the file at `path`; returns what to put into Endpoint.host_nonce. The caller removes the file at its end."""
    content = f"{_boot_id()}:{secrets.token_hex(16)}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "w") as file:
        file.write(content)
    return f"{path}#{content}"


def host_proof(endpoint: Endpoint) -> PathReason:
    """SAME_HOST when the peer's nonce can be read here; otherwise what is missing. Reads a file only under an equal boot id.

    A nonce that was read once proves the same for ever: it is drawn anew for each incarnation.
    """
    if endpoint.host_nonce in _proved:
        return PathReason.SAME_HOST
    path, _, content = endpoint.host_nonce.rpartition("#")
    if not path:
        return PathReason.NO_NONCE
    boot_id = _boot_id()
    if not boot_id or content.partition(":")[0] != boot_id:
        return PathReason.OTHER_HOST
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = file.read(_NONCE_BYTES_MAX)
    except OSError:
        return PathReason.NONCE_UNREADABLE
    if not secrets.compare_digest(found, content.encode()):
        return PathReason.NONCE_DIFFERS
    if len(_proved) >= _MAX_PROVED:
        _proved.clear()
    _proved.add(endpoint.host_nonce)
    return PathReason.SAME_HOST


@cache
def _boot_id() -> str:
    """Of the running kernel; empty where it cannot be read, and then nothing is proved."""
    try:
        with open(_BOOT_ID_PATH) as file:
            return file.read().strip()
    except OSError:
        return ""
