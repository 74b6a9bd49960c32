"""Everything about the router that a user may set, with its unit and its bound."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from protocol.errors import ConfigError


class Disaggregate(Enum):
    """Whether prefill and decode of one request run on different workers."""

    AUTO = "auto"  # a short or cached prompt is prefilled where it decodes
    ALWAYS = "always"  # on different workers whenever two can be found
    NEVER = "never"  # prefilled where it decodes


def _bounded(default: Any, minimum: float, maximum: float | None = None) -> Any:
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """Defaults suit a cluster whose workers report every 50 ms.

    Raises:
        ConfigError: a value outside its bounds.
    """

    policy: str = "prefix_cost"  # NAME[:k=v,...] or module:Class[:k=v,...]
    decode_policy: str = ""  # of the decode pool; empty: `policy` serves both
    disaggregate: Disaggregate = Disaggregate.AUTO

    # Waiting
    max_queue: int = _bounded(4096, 1)  # requests waiting, per model; beyond it 429
    max_wait_s: float = _bounded(60.0, 0.0)
    no_worker_wait_s: float = _bounded(10.0, 0.0)  # a respawned worker is back in about this time; then 503
    inbox_steps: float = _bounded(2.0, 0.1)  # prefill work a worker may have waiting, in steps of max_num_batched_tokens
    decode_overcommit: float = _bounded(1.25, 1.0)  # sequences booked on a decode worker, over its max_num_seqs
    handoff_wait_s: float = _bounded(0.25, 0.0)  # a prompt is begun if its hand-off is expected to wait for decode blocks so long at most
    refuse_by_slo: bool = True  # 429 when no worker can meet the request's SLO
    output_weight: float = _bounded(2.0, 0.0)  # price of an output token against an input token in fairness, w_q / w_p of VTC
    max_tenants: int = _bounded(10_000, 1)

    # Prefill where it decodes
    local_prefill_max_tokens: int = _bounded(32, 0)  # so few missing tokens are never sent away
    local_prefill_predicted_max_tokens: int = _bounded(2048, 0)  # more missing tokens are never kept, whatever is predicted
    local_prefill_max_missed_ratio: float = _bounded(0.7, 0.0, 1.0)
    local_prefill_interference: float = _bounded(1.0, 0.0)  # price of a second a decoding sequence stalls, in seconds a prompt waits

    # Belief
    snapshot_stale_s: float = _bounded(0.2, 0.0)  # an older snapshot is not believed: own bookings instead
    booking_settle_s: float = _bounded(0.02, 0.0)  # after this a booking has reached its worker and shows in snapshots
    booking_ttl_s: float = _bounded(900.0, 0.1)
    gateway_grace_s: float = _bounded(2.0, 0.0)  # bookings of a lost gateway end after this, as workers cancel its requests
    speculative_ttl_s: float = _bounded(2.0, 0.0)
    index_max_bytes: int = _bounded(512 << 20, 0)
    index_prefix_closed: bool = True  # no worker holds a block without its parents, as ours promise; false for engines that do not
    resync_interval_s: float = _bounded(1.0, 0.0)

    # Several routers
    peer_batch_s: float = _bounded(2e-3, 0.0, 0.1)  # bookings are told to other routers after this at the latest
    peer_batch_size: int = _bounded(256, 1, 65_536)  # changes in one message
    peer_max_blocks: int = _bounded(1024, 0, 65_536)  # leading hash blocks told with a booking, so that siblings find each other
    near_best: float = _bounded(0.05, 0.0, 1.0)  # workers this much dearer than the best are drawn among, where there are several routers
    ready_wait_s: float = _bounded(2.0, 0.0)  # a router that starts waits so long for workers and routers that do not answer
    lag_s: float = _bounded(0.8, 0.05)  # belief older than this is a lag: not ready; four times snapshot_stale_s
    max_missed_events: int = _bounded(4096, 0)  # KV events waited for; beyond it not ready

    # Estimates
    estimate_bias: float = _bounded(1.25, 1.0)  # estimates lean high: half the true cost hurts far more than twice
    estimate_error_max: float = _bounded(0.5, 0.01)  # mean relative error of a pool's estimates; beyond it requests are counted instead
    refit_interval_s: float = _bounded(1.0, 0.0)
    transfer_s_base: float = _bounded(2e-3, 0.0)
    transfer_s_per_token: float = _bounded(2e-6, 0.0)

    # Prefixes of other workers
    prefix_pull: bool = True  # a worker may pull a prefix from another where that is cheaper than computing it
    prefix_pull_min_tokens: int = _bounded(64, 16)  # fewer are computed
    prefix_pull_s_base: float = _bounded(3e-3, 0.0)  # of every pull, before its first byte
    link_bytes_per_s: float = _bounded(2e9, 1.0)  # between workers, until pulls were measured

    host_link_bytes_per_s: float = _bounded(5e9, 1.0)  # from a worker's host memory into its pool

    # Policy supervision
    policy_time_limit_s: float = _bounded(0.05, 0.0)  # above what a busy machine takes a thread away for
    policy_penalty_s: float = _bounded(1.0, 0.0)  # after an overrun least_work decides for so long

    # Explaining
    num_explained: int = _bounded(1024, 0)  # newest placements and refusals kept, some 3 KB each
    num_candidates: int = _bounded(4, 1, 8)  # scores kept in an assignment, of each pool

    def __post_init__(self) -> None:
        for spec in fields(self):
            low, high = spec.metadata.get("minimum"), spec.metadata.get("maximum")
            value = getattr(self, spec.name)
            if low is not None and not value >= low:
                raise ConfigError(f"router.{spec.name} is {value}; the least is {low}")
            if high is not None and not value <= high:
                raise ConfigError(f"router.{spec.name} is {value}; the most is {high}")
