"""A request that brings no seed gets one: from the system, or in order from `--seed`, so that a run can be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import GatewayConfig
from gateway.service import GatewayService

pytestmark = pytest.mark.pure


def drawn(model_dir: Path, config: GatewayConfig, seed: int | None) -> list[int]:
    service = GatewayService(
        config, model_dir=model_dir, directory_host="127.0.0.1", directory_port=1, secret=b"x", salt=b"s" * 32, epoch=1, name="g", seed=seed
    )
    return [service.draw_seed() for _ in range(4)]


async def test_a_seeded_gateway_draws_the_same_seeds_again(model_dir: Path, gateway_config: GatewayConfig) -> None:
    """Seen to fail with the system's generator whatever the seed."""
    assert drawn(model_dir, gateway_config, 7) == drawn(model_dir, gateway_config, 7) != drawn(model_dir, gateway_config, 8)


async def test_without_a_seed_each_gateway_draws_others(model_dir: Path, gateway_config: GatewayConfig) -> None:
    assert drawn(model_dir, gateway_config, None) != drawn(model_dir, gateway_config, None)
