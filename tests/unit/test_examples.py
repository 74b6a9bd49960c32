"""The examples that need no cluster."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from control.config import load_config
from examples import embed_router
from protocol.messages import Place
from router.policies import PlacementPolicy, PlacementView, Pool, load

pytestmark = pytest.mark.pure

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_cluster_yaml_is_a_configuration() -> None:
    config = load_config(file=EXAMPLES / "cluster.yaml")
    assert (config.workers.prefill_workers, config.workers.decode_workers) == (2, 2)
    assert config.workers.kv_cache_memory_bytes == 64 << 20


def test_tenant_home_places_a_whole_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pools, through the router that serves. `converse` asserts that the policy never failed."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "policies"))
    made = [assignment for turns in embed_router.converse(load("tenant_home:TenantHome")).values() for assignment in turns]
    assert len({assignment.prefill_worker for assignment in made}) == 1  # one tenant, one home


def test_tenant_stays_home_while_its_home_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "policies"))
    policy = load("tenant_home:TenantHome:patience_s=0.5")
    home = cheapest(policy, queues_s={"prefill-0": 0.0, "prefill-1": 0.0, "prefill-2": 0.0})
    others = {name for name in ("prefill-0", "prefill-1", "prefill-2") if name != home}
    assert cheapest(policy, queues_s={home: 0.4, **dict.fromkeys(others, 0.0)}) == home
    assert cheapest(policy, queues_s={home: 0.6, **dict.fromkeys(others, 0.0)}) != home
    survivors = {home: 0.0, min(others): 0.0}  # a stranger left: nobody moves
    assert cheapest(policy, queues_s=survivors) == home


class Quiet:
    """As much of a WorkerView as the example reads."""

    def __init__(self, worker_id: str, queue_s: float) -> None:
        self.worker_id = worker_id
        self.queued_prefill_s = queue_s


def cheapest(policy: PlacementPolicy, *, queues_s: dict[str, float]) -> str:
    view = PlacementView(
        pool=Pool.PREFILL,
        workers=[Quiet(name, queue_s) for name, queue_s in queues_s.items()],  # type: ignore[misc]
        cached_tokens={},
        device_tokens={},
        predicted_output_tokens=16,
        kv_tokens=80,
        decode_worker=None,
        transfer_s=0.0,
    )
    request = Place(
        request_id="0" * 32, attempt=0, model_id="demo", num_tokens=64, expected_output_tokens=16, num_choices=1, block_hashes=(),
        tenant="acme", priority=0, slo_ttft_s=None, slo_tpot_s=None, excluded=(), local_only=False,
    )  # fmt: skip
    costs = policy.score(view, request, 0.0, Random(0))
    return min(costs, key=lambda name: costs[name].seconds)


def test_embedded_router_sends_each_user_back_to_the_cached_prefix() -> None:
    """Seen to fail with `round_robin` for the policy."""
    embed_router.main()
    first, second = embed_router.converse(load("prefix_cost")).values()
    assert len({assignment.prefill_worker for assignment in first}) == len({assignment.prefill_worker for assignment in second}) == 1
    assert first[0].prefill_worker != second[0].prefill_worker
    assert [assignment.cached_tokens for assignment in first] == [0, 512, 1024]
