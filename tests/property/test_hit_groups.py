"""Ten groups by the cached share of a prompt: in proportion, and nobody starves, whatever comes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.hit_groups import HitGroups

pytestmark = pytest.mark.pure

P = 10


def test_of_fifty_five_slots_each_group_gets_as_many_as_its_number() -> None:
    """Preble's own example (Sec. 3.3): ten of group 10, nine of group 9, ..., one of group 1, when all wait.

    Seen to fail with the same step for all groups, and with hits rounded down to a group.
    """
    groups = HitGroups()
    waiting = [(groups.tag(100 * g, 1000), arrival, g) for arrival in range(20) for g in range(1, P + 1)]
    served = [g for *_, g in sorted(waiting)[:55]]
    assert [served.count(g) for g in range(1, P + 1)] == list(range(1, P + 1))


@pytest.mark.parametrize(("num_cached", "group"), [(0, 1), (1, 1), (100, 1), (101, 2), (630, 7), (1000, 10)])
def test_a_group_is_a_tenth_of_the_prompt(num_cached: int, group: int) -> None:
    """How: the second prompt of a group waits 1/g longer than the first."""
    groups = HitGroups()
    first, second = (groups.tag(num_cached, 1000) for _ in range(2))
    assert second - first == 2520 // group


@dataclass
class Waiting:
    group: int
    tag: int
    bounds: dict[int, int]  # overtakers allowed, by their group
    overtaken: dict[int, int]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, P)), min_size=20, max_size=300))
def test_a_prompt_is_overtaken_by_so_many_of_each_group_at_most(moves: list[tuple[bool, int]]) -> None:
    """(k + 1) * h / g + 1 of group h that came later, with k of its own group g before it.

    How: prompts come and are served in any order of coming and serving. Seen to fail without `begun`: a group that was idle overtook
    everybody with all it had saved.
    """
    groups, line = HitGroups(), list[Waiting]()
    for comes, group in moves:
        if comes or not line:
            num_before = sum(w.group == group for w in line)
            bounds = {h: -(-(num_before + 1) * h // group) + 1 for h in range(1, P + 1)}
            line.append(Waiting(group, groups.tag(100 * group, 1000), bounds, dict.fromkeys(bounds, 0)))
        else:
            index = min(range(len(line)), key=lambda i: line[i].tag)
            served = line.pop(index)
            groups.begun(served.tag)
            for earlier in line[:index]:
                earlier.overtaken[served.group] += 1
                assert earlier.overtaken[served.group] <= earlier.bounds[served.group]
