"""What it takes to bring KV to one worker from others, learned from what the worker reports of its pulls.

    seconds = scale * (base + tokens * token_s)         token_s = bytes of a token's KV / configured rate of the link
    scale   = measured over predicted seconds of this worker's pulls, a running mean

A link that is down shows as waits without tokens: the scale then grows until nobody pulls there, and falls back to 1 with time, so that
the link is tried again.
"""

from __future__ import annotations

from protocol.worker import WorkerAddress, WorkerSnapshot
from router.config import RouterConfig

_WEIGHT = 0.3
_SCALE_MIN, _SCALE_MAX = 0.05, 1000.0
_HALF_LIFE_S = 60.0


class LinkCost:
    """Seconds to bring a prefix to one worker."""

    def __init__(self, *, base_s: float, token_s: float) -> None:
        self.scale = 1.0
        self.base_s = base_s
        self.token_s = token_s
        self._seen_at_s: float | None = None

    def seconds(self, num_tokens: int) -> float:
        return self.scale * (self.base_s + num_tokens * self.token_s)

    def observe(self, before: WorkerSnapshot, after: WorkerSnapshot, now: float) -> None:
        """Learn from what the worker counted between two of its snapshots."""

        def grown(name: str) -> int:
            return max(0, after.counters.get(name, 0) - before.counters.get(name, 0))

        if self._seen_at_s is not None and self.scale != 1.0:
            self.scale = 1.0 + (self.scale - 1.0) * 0.5 ** ((now - self._seen_at_s) / _HALF_LIFE_S)
        self._seen_at_s = now
        num_done, num_failed = grown("prefix_pulls"), grown("prefix_pull_failures")
        if not num_done + num_failed:
            return
        predicted_s = (num_done + num_failed) * self.base_s + grown("prefix_pull_tokens") * self.token_s
        ratio = grown("prefix_pull_us") * 1e-6 / max(predicted_s, 1e-9)
        if not num_done:
            ratio = max(ratio, 1.0)  # a quick refusal says nothing good of the link
        self.scale = min(max(self.scale + _WEIGHT * (ratio - self.scale), _SCALE_MIN), _SCALE_MAX)


def link_to(address: WorkerAddress, config: RouterConfig) -> LinkCost:
    """Before anything was measured. A worker that does not tell how large its KV is counts as its hand-offs do."""
    token_s = address.kv_token_bytes / config.link_bytes_per_s if address.kv_token_bytes else config.transfer_s_per_token
    return LinkCost(base_s=config.prefix_pull_s_base, token_s=token_s)
