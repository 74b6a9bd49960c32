"""Several choices of one request over shared blocks, beside others that compute the same."""

from __future__ import annotations

import pytest

from protocol.worker import Role
from tests.sim_cluster import SimCluster, make_request

pytestmark = pytest.mark.pure

COMMON, OWN = list(range(3, 19)), list(range(30, 46))


def test_choices_leave_the_cache_children_first_where_another_brought_their_prefix() -> None:
    """How: two prompts that begin alike come to a decode worker together, so that their first block is there twice; the second one has
    three choices, which outlive the first. Then a prompt as large as the pool evicts all of it.

    Seen to fail ("a block was evicted before its children") with a leader that swaps a block its siblings go on holding.
    """
    cluster = SimCluster({"p0": Role.PREFILL, "d0": Role.DECODE}, num_blocks=12, max_num_batched_tokens=512)
    requests = [
        make_request(0, list(range(100, 110)), max_tokens=2),
        make_request(1, COMMON + list(range(60, 70)), max_tokens=2),
        make_request(2, COMMON + OWN + [50], n=3, temperature=1.0, seed=5, max_tokens=4),
    ]
    cluster.run(requests, spacing_s=0.0001)
    cluster.rest()
    cluster.run([make_request(3, list(range(192, 2, -1)), max_tokens=2)])
    cluster.judge()
    cluster.rest()
