"""The transfer side of one worker: what its event loop asks of kvtransfer, whatever path carries the blocks.

    source                                            target
    fill_offer(handoff) ── via the gateway ─────────► start_pull ── transport ──► generations ok ── digests ok ──► on_done
    digests_of(handoff) ── later, of an early one ──► complete_pull: only then the digests can be looked at
    on_peer_message ◄───────────────────────────────── send_to_source(AckHandoff | RenewLease | DropHandoff)

Leases, retries with other workers and recomputation are decided elsewhere (kvtransfer.handoff, the worker core); here a pull is
tried over one path, at most `pull_retries` times more over another, and ends in exactly one Outcome.
"""

from __future__ import annotations

import asyncio
import os
import stat
from array import array
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from kvtransfer import digest
from kvtransfer.auto import PathChoice, PathReason, choose_path, host_proof, write_nonce
from kvtransfer.config import TransportConfig
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_pool import DevicePool
from kvtransfer.digest_ahead import DigestAhead
from kvtransfer.fault_ahead import FaultAhead
from kvtransfer.local import LocalExchange, LocalTransport
from kvtransfer.peers import OnPeerMessage, PeerMessage, PeerPost
from kvtransfer.pulls import (
    Part,
    PullState,
    are_checked_quickly,
    complete_parts,
    digest_parts,
    place_staged,
    plan_parts,
    release_staging,
    verify_parts,
)
from kvtransfer.region import PoolMemory
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import KVTransport, Ticket, Transfer
from protocol.errors import ConfigError, LayoutMismatch
from protocol.kv import Endpoint, HandoffShard, KVHandoff, KVPeer, Outcome, TransferError
from protocol.wire import Identity

OnDone = Callable[[Outcome], None]
_PATHS = ("local", "shm", "cuda_ipc", "tcp", "ucx", "nccl")
_CHECK_HERE_BYTES = 4 << 20  # digested in 0.3 ms; a thread for less is not worth its two wake-ups
_WORTH_ANOTHER_PATH = (TransferError.PEER_LOST, TransferError.TRUNCATED, TransferError.DIGEST_MISMATCH)


class KVEndpoint:
    """One worker's pool, offered and filled. Everything runs on the loop that called `start`; callbacks come there too.

    `counters`: pulls_<path>, pull_blocks_<path>, pull_bytes_<path>, pull_failures_<error>, path_<reason>, pull_retries,
    duplicate_outcomes, offers, messages_sent, messages_received, messages_dropped. Every name is there from the start.
    """

    def __init__(
        self,
        config: TransportConfig,
        pool: PoolMemory | DevicePool,
        *,
        worker_id: str,
        epoch: int,
        secret: bytes,
        run_dir: str,
        fingerprint: bytes,
        on_peer_message: OnPeerMessage = lambda worker_id, message: None,
        exchange: LocalExchange | None = None,
        wrap: Callable[[KVTransport], KVTransport] = lambda transport: transport,
    ) -> None:
        """`run_dir` must be ours alone (0700); `exchange` is what the workers of one process share under the policy "local";
        `wrap` may put something between us and a backend (kvtransfer.faulty)."""
        self.counters: Counter[str] = Counter(dict.fromkeys(_counter_names(), 0))
        self._config = config
        self._pool = pool
        self._device_id = pool.region.device.runtime.device_id if pool.region.device is not None else ""
        self._identity = Identity(name=worker_id, kind="worker", epoch=epoch, fingerprint=fingerprint)
        self._secret = secret
        self._stem = os.path.join(run_dir, f"{worker_id}-{epoch:x}")
        self._exchange = exchange
        self._wrap = wrap
        self._post = PeerPost(self._identity, secret, config, on_peer_message, self.counters)
        self._endpoint = Endpoint()
        self._transports: dict[str, KVTransport] = {}
        self._pulls: dict[str, PullState] = {}  # by handoff id
        self._tickets: dict[tuple[str, Ticket], tuple[PullState, Part]] = {}
        self._next_region_id = pool.region.region_id + 1
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="kv-verify")
        self._digests = DigestAhead(pool.region)
        self._fault_ahead: FaultAhead | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host_nonce = ""

    async def start(self) -> None:
        """Listen on every path the policy offers.

        Raises:
            ConfigError: the run directory can be read by others, or its path is too long. OSError: a port is taken.
        """
        self._loop = asyncio.get_running_loop()
        _check_run_dir(os.path.dirname(self._stem))
        try:
            self._open_transports()
            control = await self._post.start(unix_path=f"{self._stem}.ctl", tcp=self._config.crosses_hosts)
            self._host_nonce = write_nonce(f"{self._stem}.nonce")
            if self._config.fault_ahead_bytes and self._device_id == "":
                self._fault_ahead = FaultAhead(self._pool.region, self._config.fault_ahead_bytes)
        except BaseException:
            await self.close()
            raise
        merged = replace(control, host=self._config.advertise_host or self._config.host)
        for transport in self._transports.values():
            said = transport.endpoint()
            merged = replace(
                merged,
                unix_path=said.unix_path or merged.unix_path,
                port=said.port or merged.port,
                ucx_port=said.ucx_port or merged.ucx_port,
                nccl_port=said.nccl_port or merged.nccl_port,
                cuda_path=said.cuda_path or merged.cuda_path,
                cuda_device=said.cuda_device or merged.cuda_device,
            )
        self._endpoint = replace(merged, host_nonce=self._host_nonce)

    def endpoint(self) -> Endpoint:
        """What the directory and every offer say about how to reach us; known after `start`."""
        return self._endpoint

    def fill_offer(self, handoff: KVHandoff) -> KVHandoff:
        """The offer with endpoint, epoch, region, digest mode and digests of our one shard. Reads the blocks, those of an early offer not.

        May be called from another thread: digests of 256 MiB take about 10 ms in mode SAMPLED of 32 layers, 30 ms in FULL.
        """
        mode = self._config.offer_digest_mode
        region = self._pool.region
        (shard,) = handoff.shards
        filled = replace(
            shard,
            worker_id=self._identity.name,
            epoch=self._identity.epoch,
            endpoint=self._endpoint,
            region_id=region.region_id,
            layout=region.layout,
            digest_mode=mode,
            digests=b"",
        )
        filled_handoff = replace(handoff, shards=(filled,))
        if handoff.is_complete:
            filled_handoff = replace(filled_handoff, shards=(replace(filled, digests=self.digests_of(handoff)),))
        self.counters["offers"] += 1
        return filled_handoff

    def digests_of(self, handoff: KVHandoff) -> bytes:
        """Of the blocks of our one shard, as they are now; may be called from another thread."""
        return self._digests.take(handoff, self._config.offer_digest_mode)

    def digest_ahead(self, handoff: KVHandoff) -> None:
        """Begin to read the whole blocks of an early offer, so that `digests_of` has less to read."""
        self._digests.begin(handoff, self._config.offer_digest_mode)

    def offer_read_bytes(self, handoff: KVHandoff) -> int:
        """What `digests_of` would read of the blocks."""
        num_blocks = sum(len(shard.block_ids) for shard in handoff.shards)
        return num_blocks * digest.read_bytes(self._pool.region.layout, self._config.offer_digest_mode)

    def start_pull(
        self,
        handoff: KVHandoff,
        source_indices: array[int],
        target_block_ids: array[int],
        deadline_s: float,
        on_done: OnDone,
        *,
        target_start_tokens: int | None = None,
    ) -> None:
        """Fill our blocks from the offer, verify them, call `on_done` once; never before this returns.

        An early offer's layers are followed as they are computed, and `complete_pull` must be called before it can succeed.

        With one layout on both sides block source_indices[i] of the hand-off goes to target_block_ids[i]. Otherwise the planner
        comes between: source_indices must be consecutive, target_block_ids are consecutive blocks of the sequence from token
        `target_start_tokens` on (default: where the first source block starts), and the last may be partial.
        """
        assert self._loop is not None, "start() comes first"
        now = self._loop.time()
        pull = PullState(handoff=handoff, started=now, deadline=now + deadline_s, on_done=on_done)
        if handoff.handoff_id in self._pulls:
            self._refuse(pull, f"hand-off {handoff.handoff_id} is being pulled already")
            return
        if handoff.fingerprint != self._identity.fingerprint:
            self._refuse(pull, f"the offer is of other weights: {handoff.fingerprint.hex()}, ours are {self._identity.fingerprint.hex()}")
            return
        try:
            pull.parts = plan_parts(
                handoff,
                source_indices,
                target_block_ids,
                self._pool.region,
                target_start_tokens=target_start_tokens,
                staging_bytes_max=self._config.max_staging_bytes,
                first_region_id=self._next_region_id,
            )
        except LayoutMismatch as mismatch:
            self._refuse(pull, str(mismatch))
            return
        self._next_region_id += len(pull.parts)
        self._pulls[handoff.handoff_id] = pull
        if not handoff.is_complete:
            self._expire_at_deadline(pull, f"not completed in {deadline_s:g} s")
        if handoff.is_complete or self._config.kv_transport != "local":
            self._launch(pull)

    def complete_pull(self, handoff: KVHandoff, deadline_s: float) -> None:
        """The early offer of a pull under way, with what it could not say; there are `deadline_s` left. Ended pulls are passed over."""
        assert self._loop is not None
        pull = self._pulls.get(handoff.handoff_id)
        if pull is None or pull.handoff.is_complete:
            return
        pull.deadline = self._loop.time() + deadline_s
        self._expire_at_deadline(pull, f"not done {deadline_s:g} s after prefill")
        try:
            complete_parts(pull, handoff)
        except LayoutMismatch as mismatch:
            self._stop(pull, TransferError.LEASE_EXPIRED, str(mismatch))
            return
        if self._config.kv_transport == "local":
            self._launch(pull)
        elif pull.has_arrived:
            self._arrived(pull)

    def cancel(self, handoff_id: str) -> None:
        """Stop soon; `on_done` still comes, with CANCELLED or what was first. Unknown ids are ignored."""
        pull = self._pulls.get(handoff_id)
        if pull is not None:
            self._stop(pull, TransferError.CANCELLED, "cancelled")

    def raise_generations(self, block_ids: array[int], generations: array[int]) -> None:
        """The blocks are about to be written anew: from here on nobody reads them for what they were."""
        self._pool.raise_generations(block_ids, generations)
        if self._fault_ahead is not None and block_ids:
            self._fault_ahead.reached(max(block_ids))

    def send_to_source(self, handoff: KVHandoff, message: PeerMessage) -> None:
        """Say it to every process that holds a part of the offer. At most once: a lease covers what is lost."""
        for shard in handoff.shards:
            self.send_to_peer(shard, message)

    def send_to_peer(self, peer: KVPeer | HandoffShard, message: PeerMessage) -> None:
        """Say it to one incarnation of a worker, at most once."""
        same_host = not peer.endpoint.control_port or host_proof(peer.endpoint) is PathReason.SAME_HOST
        self._post.send(peer, message, same_host=same_host)

    async def close(self) -> None:
        """Cancel every pull (each `on_done` still comes), stop listening, join threads, close and remove sockets."""
        for handoff_id in list(self._pulls):
            self.cancel(handoff_id)
        await self._post.close()
        for path, transport in self._transports.items():
            if transport.wakeup_fd() >= 0 and self._loop is not None:
                self._loop.remove_reader(transport.wakeup_fd())
            transport.close()
            self._take_outcomes(path)
        while any(pull.checking for pull in self._pulls.values()):
            await asyncio.sleep(0.001)
        self._checker.shutdown()
        self._digests.close()
        if self._fault_ahead is not None:
            self._fault_ahead.close()
        self._transports.clear()
        if self._host_nonce:
            os.unlink(f"{self._stem}.nonce")
            self._host_nonce = ""

    # --- a pull's way: launch -> outcomes of its parts -> check -> done, or launch again over another path ---

    def _launch(self, pull: PullState) -> None:
        assert self._loop is not None
        for part in pull.parts:
            choice = self._choose(pull, part)
            if choice.path is None:
                self._abort(pull, f"{part.shard.worker_id} offers no path for kv_transport {self._config.kv_transport}", choice.reason)
                return
            part.path = choice.path
            part.ours = None
            self.counters[f"path_{choice.reason.value}"] += 1
        pull.outcomes.clear()
        for part in pull.parts:
            transport = self._transports[part.path]
            if part.staging is not None:
                transport.register(part.region)
            transfer = Transfer(
                source=part.shard,
                source_indices=part.source_indices,
                target_region_id=part.region.region_id,
                target_block_ids=part.block_ids,
                deadline_s=max(0.0, pull.deadline - self._loop.time()),
            )
            ticket = transport.start(transfer)
            self._tickets[part.path, ticket] = (pull, part)
            if transport.wakeup_fd() < 0:
                self._loop.call_soon(self._take_outcomes, part.path)

    def _take_outcomes(self, path: str) -> None:
        transport = self._transports.get(path)
        if transport is None:
            return
        for ticket, outcome in transport.poll():
            pull, part = self._tickets.pop((path, ticket), (None, None))
            if pull is None or part is None:
                self.counters["duplicate_outcomes"] += 1
                continue
            if part.staging is not None:
                transport.forget(part.region.region_id)
            pull.outcomes.append(outcome)
            if outcome.error is not None:
                self._cancel_transfers(pull)
            if pull.has_arrived:
                self._arrived(pull)

    def _expire_at_deadline(self, pull: PullState, detail: str) -> None:
        """Of an early offer: its transfers may have ended long before, and then no backend keeps its deadline."""
        assert self._loop is not None
        if pull.expiry is not None:
            pull.expiry.cancel()
        pull.expiry = self._loop.call_at(pull.deadline, self._stop, pull, TransferError.DEADLINE, detail)

    def _stop(self, pull: PullState, error: TransferError, detail: str) -> None:
        """Let nothing more come of it; the first reason counts."""
        assert self._loop is not None
        if pull.stopped is None:
            pull.stopped, pull.stop_detail = error, detail
        if not self._cancel_transfers(pull) and not pull.checking:  # it waits for its completion, and nothing else will end it
            self._loop.call_soon(self._arrived, pull)

    def _cancel_transfers(self, pull: PullState) -> int:
        """How many are under way."""
        tickets = [key for key, (owner, _) in self._tickets.items() if owner is pull]
        for path, ticket in tickets:
            self._transports[path].cancel(ticket)
        return len(tickets)

    def _arrived(self, pull: PullState) -> None:
        """All parts have ended: check what came on a thread of its own, end, or wait for what an early offer could not say."""
        assert self._loop is not None
        if self._pulls.get(pull.handoff.handoff_id) is not pull or pull.checking:
            return
        failed = next((o for o in pull.outcomes if o.error not in (None, TransferError.CANCELLED)), None)
        failed = failed or next((o for o in pull.outcomes if o.error is not None), None)
        if failed is not None and (pull.stopped is None or failed.error is not TransferError.CANCELLED):
            self._failed(pull, failed)
            return
        if pull.stopped is not None:
            self._failed(pull, pull.combined(error=pull.stopped, detail=pull.stop_detail, now=self._now()))
            return
        if not pull.handoff.is_complete:
            self._read_ahead(pull)
            return
        if are_checked_quickly(pull.parts, _CHECK_HERE_BYTES):
            try:
                bad_blocks = _check(pull)
            except Exception as broken:
                self._checked(pull, "", broken)
            else:
                self._checked(pull, bad_blocks, None)
            return
        pull.checking = True
        checked = self._loop.run_in_executor(self._checker, _check, pull)
        checked.add_done_callback(lambda future: self._checked(pull, "" if future.exception() else future.result(), future.exception()))

    def _read_ahead(self, pull: PullState) -> None:
        """Of an early offer all has arrived: digest it while its source still works on the rest."""
        assert self._loop is not None
        if all(part.ours is not None for part in pull.parts):
            return
        pull.checking = True
        reading = self._loop.run_in_executor(self._checker, digest_parts, pull.handoff, pull.parts)

        def done(future: asyncio.Future[None]) -> None:
            pull.checking = False
            if future.exception() is None or pull.handoff.is_complete or pull.stopped is not None:
                self._arrived(pull)  # where reading broke down, the check reads again once it may, and meets the same

        reading.add_done_callback(done)

    def _checked(self, pull: PullState, bad_blocks: str, broken: BaseException | None) -> None:
        pull.checking = False
        if broken is not None:  # a bug of ours: the pull still ends, and the loop's exception handler hears of it
            assert self._loop is not None
            self._loop.call_exception_handler({"message": "the check of a pull broke down", "exception": broken})
            self._finish(pull, pull.combined(error=TransferError.REFUSED, detail=f"the check broke down: {broken!r}", now=self._now()))
            return
        if bad_blocks:
            self._failed(pull, pull.combined(error=TransferError.DIGEST_MISMATCH, detail=bad_blocks, now=self._now()))
        elif pull.stopped is not None:
            self._failed(pull, pull.combined(error=pull.stopped, detail=pull.stop_detail, now=self._now()))
        else:
            self._finish(pull, pull.combined(error=None, detail="", now=self._now()))

    def _failed(self, pull: PullState, outcome: Outcome) -> None:
        pull.tried |= {part.path for part in pull.parts}
        retry = outcome.error in _WORTH_ANOTHER_PATH and pull.stopped is None and len(pull.tried) <= self._config.pull_retries
        if retry and all(self._choose(pull, part).path for part in pull.parts):
            self.counters["pull_retries"] += 1
            self._launch(pull)
            return
        self._finish(pull, replace(outcome, num_blocks=0, size_bytes=0, duration_s=self._now() - pull.started))

    def _refuse(self, pull: PullState, detail: str) -> None:
        """End a pull that never began; on the next turn of the loop, since the caller is still inside start_pull."""
        assert self._loop is not None
        outcome = Outcome(num_blocks=0, size_bytes=0, duration_s=0.0, path="", error=TransferError.REFUSED, detail=detail)
        self._loop.call_soon(self._finish, pull, outcome)

    def _choose(self, pull: PullState, part: Part) -> PathChoice:
        return choose_path(self._config.kv_transport, part.shard.endpoint, tried=pull.tried, device_id=self._device_id)

    def _abort(self, pull: PullState, detail: str, reason: PathReason) -> None:
        self.counters[f"path_{reason.value}"] += 1
        self._refuse(pull, f"{detail} ({reason.value})")

    def _finish(self, pull: PullState, outcome: Outcome) -> None:
        if self._pulls.get(pull.handoff.handoff_id) is pull:
            del self._pulls[pull.handoff.handoff_id]
        if pull.expiry is not None:
            pull.expiry.cancel()
        release_staging(pull.parts)
        if outcome.error is None:
            for part in pull.outcomes:
                self.counters[f"pulls_{part.path}"] += 1
                self.counters[f"pull_blocks_{part.path}"] += part.num_blocks
                self.counters[f"pull_bytes_{part.path}"] += part.size_bytes
        else:
            self.counters[f"pull_failures_{outcome.error.value}"] += 1
        pull.on_done(outcome)

    def _open_transports(self) -> None:
        config, policy, device = self._config, self._config.kv_transport, self._pool.region.device
        opened: list[KVTransport] = []
        if (device is not None and not config.offers_cuda_ipc) or (device is None and policy == "cuda_ipc"):
            where = "the host" if device is None else self._device_id
            raise ConfigError(f"kv_transport is {policy}, and this worker's pool is in memory of {where}; choose auto")
        if device is not None:
            path = f"{self._stem}.kv"
            opened.append(CudaIpcTransport(self._identity, self._secret, config, unix_path=path, runtime=device.runtime))
        elif policy == "local":
            if self._exchange is None:
                raise ConfigError('kv_transport is "local", which needs the LocalExchange that all workers of this process share')
            opened.append(LocalTransport(self._exchange, worker_id=self._identity.name, epoch=self._identity.epoch))
        if config.offers_shm and device is None:
            opened.append(ShmTransport(self._identity, self._secret, config, unix_path=f"{self._stem}.kv"))
        if config.offers_tcp and device is None:
            opened.append(TcpTransport(self._identity, self._secret, config))
        if policy == "ucx":
            from kvtransfer.ucx import UcxTransport  # an optional package

            opened.append(UcxTransport(self._identity, self._secret, config))
        if policy == "nccl":
            from kvtransfer.nccl import NcclTransport  # imports torch

            opened.append(NcclTransport(self._identity, self._secret, config))
        assert self._loop is not None
        for transport in map(self._wrap, opened):
            transport.register(self._pool.region)
            self._transports[transport.name] = transport
            if transport.wakeup_fd() >= 0:
                self._loop.add_reader(transport.wakeup_fd(), self._take_outcomes, transport.name)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()


def _check(pull: PullState) -> str:
    """Runs on the checking thread: digests first, then staged blocks go to their place. Text names bad blocks; empty: none."""
    bad = verify_parts(pull.handoff, pull.parts)
    if not bad:
        place_staged(pull.parts)
    return bad


def _counter_names() -> list[str]:
    names = [f"{what}_{path}" for what in ("pulls", "pull_blocks", "pull_bytes") for path in _PATHS]
    names += [f"pull_failures_{error.value}" for error in TransferError]
    names += [f"path_{reason.value}" for reason in PathReason]
    return [*names, "pull_retries", "duplicate_outcomes", "offers", "messages_sent", "messages_received", "messages_dropped"]


def _check_run_dir(path: str) -> None:
    os.makedirs(path, mode=0o700, exist_ok=True)
    mode = os.stat(path)
    if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o077:
        raise ConfigError(f"the run directory {path} is open to others (mode {stat.S_IMODE(mode.st_mode):o}); chmod 700 it")
