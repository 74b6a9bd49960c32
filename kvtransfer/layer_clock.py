"""How far a pool's steps have come, as one word that peers may read: the watermark of offers that precede the end of their prefill.

    step k of a model of L layers    (k+1)(L+1)   (k+1)(L+1) + l + 1         (k+2)(L+1)
                                     begins       KV of its layer l is there   is done

The word lies in the pool's file behind the generations. Steps run in order and the word only grows, so "layer l of step k is written,
and every step before" is one comparison, whoever asks and however late.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvtransfer.handoff import step_begin
from kvtransfer.transport import Region

_POLL_S_MIN = 50e-6
_POLL_S_MAX = 500e-6  # half of what a hand-off may cost beside its copy


def reached(region: Region) -> int:
    """The word as it is now."""
    return region.clock[0]


class LayerClock:
    """Written by whoever computes into the pool: one thread."""

    def __init__(self, region: Region) -> None:
        self._word = region.clock
        self._num_layers = region.layout.num_layers
        self.step_done(-1)

    def layer_done(self, step_id: int, layer: int) -> None:
        """KV of `layer` of step `step_id` is written."""
        self._word[0] = step_begin(step_id, self._num_layers) + layer + 1

    def step_done(self, step_id: int) -> None:
        """Also of a step that failed: whoever waits for it learns of the failure in another way."""
        self._word[0] = step_begin(step_id + 1, self._num_layers)


def wait_for(region: Region, clock: int, pause: Callable[[float], None]) -> int:
    """Return the word once it is `clock` or more. `pause(seconds)` waits that long, or raises to give up."""
    began = time.monotonic()
    while (now := reached(region)) < clock:
        waited_s = time.monotonic() - began
        pause(min(max(_POLL_S_MIN, waited_s / 4), _POLL_S_MAX))
    return now
