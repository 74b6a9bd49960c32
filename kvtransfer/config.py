"""How this process moves KV blocks: which path, which checks, and the bound of everything that waits."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ConfigError
from protocol.kv import DigestMode, FailurePolicy
from protocol.wire import is_loopback

KV_TRANSPORTS = ("auto", "shm", "cuda_ipc", "tcp", "ucx", "nccl", "local")

# What each path can break: shared memory only what software breaks, a network also what hardware does.
DEFAULT_DIGEST_MODE = {
    "local": DigestMode.SAMPLED,
    "shm": DigestMode.SAMPLED,
    "cuda_ipc": DigestMode.SAMPLED,
    "tcp": DigestMode.FULL,
    "ucx": DigestMode.FULL,
    "nccl": DigestMode.FULL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportConfig:
    kv_transport: str = "auto"  # auto: by the peer's proof cuda_ipc or shm, else tcp; ucx and nccl only when asked for
    digest_mode: DigestMode | None = None  # None: by path, DEFAULT_DIGEST_MODE
    host: str = "127.0.0.1"  # data and control sockets of the tcp path listen here
    advertise_host: str = ""  # what peers dial; empty: `host`
    port: int = 0  # data socket; 0: any free port
    control_port: int = 0
    ucx_port: int = 0  # conversations whose bytes go by UCX or NCCL; 0: any free port
    nccl_port: int = 0
    pull_retries: int = 1  # further tries of a failed pull, each over another path
    kv_load_failure_policy: FailurePolicy = FailurePolicy.RECOMPUTE  # once a pull has failed over every path it may take
    connect_timeout_s: float = 5.0  # connecting and authenticating, within the pull's deadline
    stall_timeout_s: float = 30.0  # a peer that takes none of our bytes for this long is cut off
    idle_close_s: float = 60.0  # a peer not pulled from for this long is disconnected and unmapped
    max_inflight_bytes: int = 64 << 20  # a tcp pull asks for at most this much ahead of what has arrived
    channel_bytes: int = 16 << 20  # a piece that UCX or NCCL carries at once; three of them are staged on either side of a connection
    socket_buffer_bytes: int = 512 << 10  # above 1 MiB loopback falls out of the cache and halves
    copy_slice_bytes: int = 4 << 20  # between two slices a copy looks for cancellation, deadline and the owner's death
    max_staging_bytes: int = 256 << 20  # blocks of another layout wait here while they are verified
    fault_ahead_bytes: int = 64 << 20  # of the pool that are memory before they are asked for; 0: pages come when they are written
    max_peers: int = 64  # connections each way
    max_queued_pulls: int = 1024  # a peer
    max_queued_messages: int = 4096  # a peer: acknowledgements, renewals, drops

    def __post_init__(self) -> None:
        if self.kv_transport not in KV_TRANSPORTS:
            raise ConfigError(f"kv_transport is {self.kv_transport!r}; choose one of {', '.join(KV_TRANSPORTS)}")
        if self.host in ("0.0.0.0", "::") and not self.advertise_host:  # noqa: S104 - this is where it is caught
            raise ConfigError(f"host {self.host} names no address that peers could dial; set advertise_host")
        for name, least in (
            ("max_inflight_bytes", 1),
            ("copy_slice_bytes", 1),
            ("socket_buffer_bytes", 64 << 10),
            ("max_peers", 1),
            ("channel_bytes", 1),
            ("fault_ahead_bytes", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def offers_shm(self) -> bool:
        return self.kv_transport in ("auto", "shm")

    @property
    def offers_cuda_ipc(self) -> bool:
        return self.kv_transport in ("auto", "cuda_ipc")

    @property
    def offers_tcp(self) -> bool:
        return self.kv_transport in ("auto", "tcp")

    @property
    def crosses_hosts(self) -> bool:
        """Peers may be on another host, so acknowledgements and leases go over TCP as well."""
        return self.kv_transport in ("auto", "tcp", "ucx", "nccl")

    @property
    def offer_digest_mode(self) -> DigestMode:
        """Of the offers we make, before it is known who pulls: full as soon as a pull may come over a real network."""
        if self.digest_mode is not None:
            return self.digest_mode
        if self.kv_transport == "auto":
            return DEFAULT_DIGEST_MODE["shm" if is_loopback(self.host) else "tcp"]
        return DEFAULT_DIGEST_MODE[self.kv_transport]
