"""Which of the prompts that wait in a worker is next, by how much of each is cached: Preble's ten groups (Sec. 3.3, ICLR'25).

A prompt is of group g = 1..10 by the tenths of it that are cached, and the groups are served in proportion: of 55 prompts, with all groups
waiting, ten are of group 10 and one of group 1. Prompts that need little computing go first, which hands them on sooner, and yet nobody
starves. This is the mix of the paper; the code released with it serves one group a turn, in turns.

It is fair queueing by start times: each prompt gets a tag when it begins to wait, and lower tags go first.

    tag(prompt of group g) = max(tag(the last of its group) + 1/g, tag(the last that was begun))

A tag never changes, so order is what it is for every other policy: a figure of the sequence. A prompt with k of its group before it is
overtaken by at most (k + 1) * h / g + 1 later ones of group h.
"""

from __future__ import annotations

from math import lcm

from engine.core.sequence import Sequence


class HitGroups:
    """The tags of one worker."""

    def __init__(self, num_groups: int = 10) -> None:
        self._num_groups = num_groups
        self._one = lcm(*range(1, num_groups + 1))  # tags are whole numbers of 1/_one
        self._next_tags = [0] * num_groups
        self._begun_tag = 0

    def place(self, sequence: Sequence, num_cached_tokens: int) -> None:
        """Give a sequence that begins to wait, and the choices it stands for, their place among those of its priority."""
        tag = self.tag(num_cached_tokens, len(sequence.tokens))
        for member in sequence.members():
            priority, _, arrival, choice = member.order
            member.order = (priority, tag, arrival, choice)

    def tag(self, num_cached_tokens: int, num_tokens: int) -> int:
        """Of a prompt that begins to wait now."""
        group = max(0, -(-self._num_groups * num_cached_tokens // num_tokens) - 1)
        tag = max(self._next_tags[group], self._begun_tag)
        self._next_tags[group] = tag + self._one // (group + 1)
        return tag

    def begun(self, tag: int) -> None:
        """The prompt with this tag waits no more: nobody that comes now goes before its place."""
        self._begun_tag = max(self._begun_tag, tag)
