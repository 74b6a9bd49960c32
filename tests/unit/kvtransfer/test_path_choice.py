"""Which path a pull takes, and the configuration behind it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtransfer.auto import PathReason, choose_path, host_proof, write_nonce
from kvtransfer.config import TransportConfig
from protocol.errors import ConfigError
from protocol.kv import DigestMode, Endpoint

pytestmark = pytest.mark.pure


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(unix_path="/run/x.kv", host="127.0.0.1", port=9, host_nonce=write_nonce(str(tmp_path / "n#1")))


def test_auto_prefers_shared_memory_and_then_tcp(endpoint: Endpoint) -> None:
    assert host_proof(endpoint) is PathReason.SAME_HOST, "a # in the path is no obstacle"
    assert choose_path("auto", endpoint).path == "shm"
    retry = choose_path("auto", endpoint, tried=("shm",))
    assert (retry.path, retry.reason) == ("tcp", PathReason.RETRY)
    none_left = choose_path("auto", endpoint, tried=("shm", "tcp"))
    assert (none_left.path, none_left.reason) == (None, PathReason.NOT_OFFERED)


@pytest.mark.parametrize("policy", ["shm", "tcp"])
def test_a_configured_path_is_taken_or_nothing_is(policy: str, endpoint: Endpoint) -> None:
    assert choose_path(policy, endpoint).path == policy
    assert choose_path(policy, Endpoint()).path is None
    assert choose_path(policy, endpoint, tried=(policy,)).path is None


def test_a_host_is_proved_once_and_others_are_not_believed_for_it(endpoint: Endpoint) -> None:
    """A nonce that was read is not read again. Seen to fail with every endpoint of that path believed."""
    assert host_proof(endpoint) is PathReason.SAME_HOST
    path, _, content = endpoint.host_nonce.rpartition("#")
    os.unlink(path)
    assert host_proof(endpoint) is PathReason.SAME_HOST
    other = Endpoint(host_nonce=f"{path}#{content[:-1]}{'0' if content[-1] != '0' else '1'}")
    assert host_proof(other) is PathReason.NONCE_UNREADABLE


def test_nonce_is_ours_alone_and_written_once(endpoint: Endpoint, tmp_path: Path) -> None:
    path = endpoint.host_nonce.rpartition("#")[0]
    assert os.stat(path).st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_nonce(path)


def test_a_link_or_pipe_in_place_of_the_nonce_proves_nothing_and_blocks_nobody(endpoint: Endpoint, tmp_path: Path) -> None:
    """Fails without O_NOFOLLOW, hangs without O_NONBLOCK (planted)."""
    path, _, content = endpoint.host_nonce.rpartition("#")
    os.symlink(path, tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    assert host_proof(Endpoint(host_nonce=f"{tmp_path}/link#{content}")) is PathReason.NONCE_UNREADABLE
    assert host_proof(Endpoint(host_nonce=f"{tmp_path}/pipe#{content}")) is PathReason.NONCE_DIFFERS


def test_unusable_configuration_is_named() -> None:
    with pytest.raises(ConfigError, match="choose one of auto, shm, cuda_ipc, tcp, ucx, nccl, local"):
        TransportConfig(kv_transport="rdma")
    with pytest.raises(ConfigError, match="advertise_host"):
        TransportConfig(host="0.0.0.0")
    with pytest.raises(ConfigError, match="socket_buffer_bytes is 1"):
        TransportConfig(socket_buffer_bytes=1)


def test_digests_are_full_as_soon_as_a_network_may_carry_the_blocks() -> None:
    modes = {
        (policy, host): TransportConfig(kv_transport=policy, host=host).offer_digest_mode
        for policy in ("auto", "shm", "tcp", "local")
        for host in ("127.0.0.1", "10.1.2.3")
    }
    assert modes["auto", "127.0.0.1"] is modes["shm", "10.1.2.3"] is modes["local", "127.0.0.1"] is DigestMode.SAMPLED
    assert modes["auto", "10.1.2.3"] is modes["tcp", "127.0.0.1"] is DigestMode.FULL
    assert TransportConfig(kv_transport="tcp", digest_mode=DigestMode.OFF).offer_digest_mode is DigestMode.OFF
