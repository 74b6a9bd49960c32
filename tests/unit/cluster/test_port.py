"""The user's port: busy ones are told at once, ours is shared among our gateways and kept from others."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from cluster.port import PortInUse, ReservedPort, listen_shared
from protocol.errors import ConfigError

pytestmark = pytest.mark.pure


def test_a_busy_port_is_told_with_pid_and_flag(tmp_path: Path) -> None:
    """Some server listens there; the error comes at once. Fails when SO_REUSEPORT is asked for without a probe."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = other.getsockname()[1]
        began_s = time.monotonic()
        with pytest.raises(PortInUse, match=rf"{port}.*pid {os.getpid()}.*--port"):
            ReservedPort("127.0.0.1", port, locks=tmp_path)
        assert time.monotonic() - began_s < 2.0
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_is_kept_from_the_port_of_one_that_still_starts(tmp_path: Path) -> None:
    """Nobody listens yet. Fails without the lock file: both would share the port."""
    first = ReservedPort("127.0.0.1", 0, locks=tmp_path)
    named = ReservedPort("127.0.0.1", _free_port(), locks=tmp_path)
    with pytest.raises(PortInUse, match=rf"pid {os.getpid()}.*--port"):
        ReservedPort("127.0.0.1", named.port, locks=tmp_path)
    named.release()
    ReservedPort("127.0.0.1", named.port, locks=tmp_path).release()
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_gateways_of_one_run_share_the_port(tmp_path: Path) -> None:
    """Two listen beside the reservation, a stranger cannot. Fails when SO_REUSEPORT is not set on all of them."""
    reserved = ReservedPort("127.0.0.1", 0, locks=tmp_path)
    one = listen_shared("127.0.0.1", reserved.port, backlog=8)
    two = listen_shared("127.0.0.1", reserved.port, backlog=8)
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError):
            stranger.bind(("127.0.0.1", reserved.port))
    assert reserved.url == f"http://127.0.0.1:{reserved.port}"
    for held in (one, two):
        held.close()
    reserved.release()


def test_a_restart_follows_connections_in_time_wait(tmp_path: Path) -> None:
    """The server closed first, so its end lingers for a minute. Fails without SO_REUSEADDR, as Serve's direct ingress does."""
    port = _free_port()
    reserved = ReservedPort("127.0.0.1", port, locks=tmp_path)
    listening = listen_shared("127.0.0.1", port, backlog=8)
    client = socket.create_connection(("127.0.0.1", port))
    served, _ = listening.accept()
    served.close()
    assert client.recv(1) == b""
    client.close()
    listening.close()
    reserved.release()
    again = ReservedPort("127.0.0.1", port, locks=tmp_path)
    listen_shared("127.0.0.1", port, backlog=8).close()
    again.release()


@pytest.mark.parametrize("host", ["192.0.2.200", "no-such-host.invalid"])
def test_a_host_that_is_not_ours_is_told_with_the_flag(host: str, tmp_path: Path) -> None:
    """Fails when the OSError comes through."""
    with pytest.raises(ConfigError, match="--host"):
        ReservedPort(host, 0, locks=tmp_path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
