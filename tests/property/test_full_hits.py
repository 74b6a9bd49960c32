"""Prompts that lie in the cache to their last token: the block they end in is copied before it is written, and tokens stay what they are.

How: few prompts of whole blocks, asked for again and again by one or several choices, on workers of any shape; tokens are compared with
the undisturbed run and the laws of blocks are asserted after every turn, as in test_worker_core_laws.py.
Seen to fail with the last token not computed either, with the copied block still counted as stored, and with its source not pinned.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.worker import Role
from tests.property.test_worker_core_laws import SHARED
from tests.sim_cluster import SimCluster, make_request

pytestmark = pytest.mark.pure


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([16, 32, 48]), min_size=4, max_size=9),
    choices=st.integers(1, 3),
    shape=st.fixed_dictionaries(
        {
            "num_blocks": st.sampled_from([7, 9, 16]),
            "block_size": st.sampled_from([16, 32]),
            "max_num_batched_tokens": st.sampled_from([1, 16, 100]),
            "max_inflight_steps": st.sampled_from([1, 2]),
            "force_preempt_every": st.sampled_from([0, 2]),
        }
    ),
    is_split=st.booleans(),
    spacing_s=st.sampled_from([0.0, 0.003, 0.2]),
)
def test_full_hits_change_no_token(lengths: list[int], choices: int, shape: dict[str, Any], is_split: bool, spacing_s: float) -> None:
    cluster = SimCluster({"p0": Role.PREFILL, "d0": Role.DECODE} if is_split else {"b0": Role.BOTH}, **shape)
    requests = [
        make_request(n, SHARED[:length], n=choices, temperature=1.0, seed=n, max_tokens=(3, 40, 20)[n % 3])
        for n, length in enumerate(lengths)
    ]
    cluster.run(requests, spacing_s=spacing_s)
    cluster.judge()
    cluster.rest()
