"""The router names who holds a prefix; the gateway tells the prefill worker where that is, while it can be reached.

How: the fakes of conftest.py around a real gateway; the router names prefill-1 in every assignment.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from protocol.messages import PrefixSource, Submit
from protocol.worker import WorkerState

pytestmark = pytest.mark.pure

SOURCE = PrefixSource(worker_id="prefill-1", num_tokens=48, pull_s=0.001, compute_s=0.01)


async def submits_of_one_request(cluster: Any) -> list[Submit]:
    answer = cluster.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
    await asyncio.wait_for(answer, 5)
    return [m for w in cluster.workers.values() for m in w.received if isinstance(m, Submit)]


async def test_the_prefill_worker_is_told_where_the_prefix_lies(cluster: Any) -> None:
    """Address and incarnation are the directory's; the decode worker gets the hand-off alone. Seen to fail with the source not sent on."""
    cluster.router.prefix_source = SOURCE
    submits = await submits_of_one_request(cluster)
    (first,) = [s for s in submits if s.prefill_only]
    assert first.prefix_pull is not None and first.prefix_pull.num_tokens == 48
    peer, address = first.prefix_pull.peer, cluster.workers["prefill-1"]._address()
    assert (peer.worker_id, peer.epoch, peer.endpoint) == ("prefill-1", address.epoch, address.kv_endpoint)
    assert [s.prefix_pull for s in submits if not s.prefill_only] == [None]


@pytest.mark.parametrize("trouble", ["unknown", "draining", "dead"])
async def test_a_source_that_cannot_be_reached_is_left_out(cluster: Any, trouble: str) -> None:
    """The request goes on without. Seen to fail with `prefix_pull` looking at the address alone."""
    cluster.router.prefix_source = SOURCE
    source = cluster.workers["prefill-1"]
    if trouble == "unknown":
        cluster.router.prefix_source = PrefixSource(worker_id="prefill-9", num_tokens=48, pull_s=0.001, compute_s=0.01)
    elif trouble == "draining":
        source.state = WorkerState.DRAINING
        await wait(lambda: cluster.service.workers.rows["prefill-1"].state is WorkerState.DRAINING)
    else:
        await source.kill()
        cluster.router.workers.remove(source)
        await wait(lambda: not cluster.service.workers.is_up("prefill-1"))
    assert [s.prefix_pull for s in await submits_of_one_request(cluster)] == [None, None]


async def wait(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
