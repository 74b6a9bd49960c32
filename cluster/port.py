"""The port users talk to: taken before anything is started, so that a busy one is an error in a moment and not after a minute."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from cluster.processes import ProcessId, listeners
from protocol.errors import ConfigError


class PortInUse(ConfigError):
    """Somebody else has the port; the text names the process and the flag."""


class ReservedPort:
    """Holds host:port, not listening, until `release`.

    The gateways of this run listen on the same port beside it (SO_REUSEPORT works within one user), nobody else can; a lock
    file keeps a second run of the same user out. SO_REUSEADDR lets a new run follow an old one whose connections still
    linger in TIME_WAIT, which Serve's own ingress does not.
    """

    def __init__(self, host: str, port: int, *, locks: Path) -> None:
        """Port 0 takes any free one.

        Raises:
            PortInUse: with the pid when the holder is visible to us. ConfigError: not our host, or not allowed.
        """
        self.host = host
        self._lock = -1
        self._lock_path: Path | None = None
        family = _family(host, port)
        if port:
            self._take_lock(locks / f"port-{port}.lock", host, port)
        try:
            if port:
                _probe(family, host, port)
            self._socket = bind_shared(family, host, port)
        except OSError as error:
            self._drop_lock()
            raise _explained(error, host, port) from None
        except ConfigError:
            self._drop_lock()
            raise
        self.port: int = self._socket.getsockname()[1]

    @property
    def url(self) -> str:
        """As a client on this machine would say it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, f"[{self.host}]" if ":" in self.host else self.host)  # noqa: S104
        return f"http://{host}:{self.port}"

    def release(self) -> None:
        self._socket.close()
        self._drop_lock()

    def _take_lock(self, path: Path, host: str, port: int) -> None:
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 32).decode()
            os.close(self._lock)
            self._lock = -1
            raise PortInUse(f"port {port} on {host} is taken by pid {holder} (another run of baton); choose another with --port") from None
        self._lock_path = path
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def _drop_lock(self) -> None:
        if self._lock >= 0:
            assert self._lock_path is not None
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def bind_shared(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    """A bound TCP socket, not listening, that shares its port with others of this user that ask for the same."""
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def listen_shared(host: str, port: int, *, backlog: int) -> socket.socket:
    """What a gateway replica accepts from."""
    listening = bind_shared(_family(host, port), host, port)
    listening.listen(backlog)
    return listening


def _probe(family: socket.AddressFamily, host: str, port: int) -> None:
    """Without SO_REUSEPORT the kernel tells of any listener, whoever's it is."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)


def _family(host: str, port: int) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    except OSError as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error.strerror or error}") from None


def _explained(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        pids = sorted({pid for held in listeners() if held.port == port for pid in held.pids})
        who = "another user's process"
        if pids:
            title = ProcessId(pid=pids[0], start_ticks=0).title
            who = f"pid {pids[0]} ({title[:60]})" if title else f"pid {pids[0]}"
        return PortInUse(f"port {port} on {host} is taken by {who}; stop it or choose another with --port")
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} needs privileges this user lacks; choose one above 1023 with --port")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"--host {host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all of its networks")
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --host or --port")
