"""From a config to a gateway: its service and the ASGI app in front of it, put together in the process that serves."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.types import ASGIApp

from control.config import ClusterConfig
from gateway.app import make_app
from gateway.service import GatewayService
from gateway.tracing import open_spans


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySpec:
    """All a gateway process is told. Travels by Ray (private to the cluster), never over our own sockets."""

    config: ClusterConfig
    model_dir: Path
    host: str
    port: int
    directory_host: str
    directory_port: int
    secret: bytes
    salt: bytes  # keys the prefix hashes; the same for every gateway of a run, and known to them alone
    drain_s: float
    own_ray: bool
    application: str  # its name in Serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    service: GatewayService
    app: ASGIApp


def build_gateway(spec: GatewaySpec) -> Gateway:
    """Tokenizer, limits and routes; `await service.start()` joins the cluster.

    Raises:
        ModelError: the tokenizer is missing or unreadable. ConfigError: traces are asked for, without the packages for them.
    """
    config = spec.config.gateway
    service = GatewayService(
        replace(config, served_model_names=config.served_model_names or (spec.config.model.model_id,)),
        model_dir=spec.model_dir,
        directory_host=spec.directory_host,
        directory_port=spec.directory_port,
        secret=spec.secret,
        salt=spec.salt,
        epoch=time.time_ns(),
        name=f"gateway-{os.getpid()}",
        seed=spec.config.workers.seed,
        spans=open_spans(config.otlp_traces_endpoint),
    )
    return Gateway(service=service, app=make_app(service))
