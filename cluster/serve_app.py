"""The gateway as a Ray Serve deployment whose replicas open the user's port themselves: direct ingress, without Serve's own.

Serve starts, watches and replaces the replicas and ends them with grace. The data path is HTTP server -> our ASGI app, nothing
between. Serve 2.60 has three ways in; none holds our promises (docs/decisions/0003-gateways-open-the-port.md):

    proxy           one more Python process that every token passes
    direct ingress  a port of its own for each replica, bound without SO_REUSEADDR: a restart on --port is refused for a minute;
                    request bodies are read into an unbounded queue before the application sees them
    HAProxy         its metrics port is open on every network, whatever host is asked for

With SO_REUSEPORT every replica listens on --port and the kernel spreads the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.event_log import log_events
from cluster.loop_thread import LoopThread
from cluster.port import listen_shared

if TYPE_CHECKING:
    import uvicorn

    from cluster.gateway_build import GatewaySpec

log = logging.getLogger("baton.gateway")

BACKLOG = 2048
START_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 2.0
KEEP_ALIVE_S = 75.0  # longer than a load balancer's 60
ORPHAN_PROBE_S = 5.0
ORPHAN_AFTER_S = 30.0  # the directory is gone for so long: so is the run
MAX_ONGOING_REQUESTS = 4096  # what Serve would bound; the gateway has its own bounds and its own answers
CPU_SHARE = 0.001


class GatewayReplica:
    """One gateway: its service and an HTTP server on a loop thread of its own, apart from Serve's loops."""

    def __init__(self, spec: GatewaySpec) -> None:
        from cluster.gateway_build import build_gateway

        _keep_serve_on_loopback()
        log_events()
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._spec = spec
        self._loop = LoopThread("baton-gateway")
        gateway = build_gateway(spec)
        self._gateway = gateway
        self._loop.run(gateway.service.start(), timeout_s=START_TIMEOUT_S)
        self._server = _http_server(gateway.app, drain_s=spec.drain_s)
        self._socket = listen_shared(spec.host, spec.port, backlog=BACKLOG)
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(sockets=[self._socket]), self._loop.loop)
        if not spec.own_ray:
            asyncio.run_coroutine_threadsafe(_end_orphan(spec), self._loop.loop)

    def check_health(self) -> None:
        """Asked by Serve's controller every 5 s; an exception replaces this replica."""
        if self._serving.done():
            raise RuntimeError("the HTTP server has ended") from self._serving.exception()

    def __del__(self) -> None:
        """Serve's last call: stop accepting, let open streams end for `drain_s`, close."""
        if not hasattr(self, "_serving"):
            return
        self._server.should_exit = True
        with contextlib.suppress(Exception):
            self._loop.run(self._gateway.service.drain(self._spec.drain_s), timeout_s=self._spec.drain_s + CLOSE_TIMEOUT_S)
        with contextlib.suppress(Exception):
            self._serving.result(timeout=CLOSE_TIMEOUT_S)
        with contextlib.suppress(Exception):
            self._loop.run(self._gateway.service.close(), timeout_s=CLOSE_TIMEOUT_S)
        self._loop.close()


def _http_server(app: Any, *, drain_s: float) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:
            """The process's signals are Ray's."""
            yield

    return Server(
        uvicorn.Config(
            app,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=int(KEEP_ALIVE_S),
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
    )


def _keep_serve_on_loopback() -> None:
    """Serve opens a port on every network for calls between deployments, of which there are none. Called before it does."""
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, _: add_port(server, "127.0.0.1:0")


async def _end_orphan(spec: GatewaySpec) -> None:
    """Serve's applications outlive the driver that made them; on a Ray that is not ours, remove ours when its run is gone."""
    unseen_s = 0.0
    while unseen_s < ORPHAN_AFTER_S:
        await asyncio.sleep(ORPHAN_PROBE_S)
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(spec.directory_host, spec.directory_port), ORPHAN_PROBE_S)
            writer.close()
            unseen_s = 0.0
        except (OSError, TimeoutError):
            unseen_s += ORPHAN_PROBE_S
    log.warning("the run is gone; removing its application", extra={"application": spec.application})
    from ray import serve

    await asyncio.to_thread(serve.delete, spec.application, _blocking=False)


# --- on the driver's side ---------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Endpoint:
    """Our application in the cluster's Serve, seen from the driver."""

    application: str
    owns_serve: bool  # there was no Serve before us

    @classmethod
    def start(cls, application: str) -> Endpoint:
        """Make sure that Serve runs, without proxies of its own. Takes 1-2 s where it has to be started."""
        from ray import serve
        from ray.serve.context import _get_global_client

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        owns_serve = _get_global_client(raise_if_no_controller_running=False) is None
        if owns_serve:
            serve.start(proxy_location="Disabled", logging_config=_logging_config())
        return cls(application=application, owns_serve=owns_serve)

    def deploy(self, spec: GatewaySpec, *, num_replicas: int, near: str) -> None:
        """Start the replicas; returns before they are ready.

        near: Ray's name of a node's address resource ("node:10.0.0.1"): the machine whose --host and --port are meant.
        """
        from ray import serve

        deployment = serve.deployment(
            GatewayReplica,
            name="gateway",
            num_replicas=num_replicas,
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            ray_actor_options={"num_cpus": CPU_SHARE, "resources": {near: CPU_SHARE}},
            health_check_period_s=5.0,
            graceful_shutdown_wait_loop_s=0.05,
            graceful_shutdown_timeout_s=spec.drain_s + 2 * CLOSE_TIMEOUT_S,
            logging_config=_logging_config(),
        )
        target = serve.RunTarget(target=deployment.bind(spec), name=self.application, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)

    def failure(self) -> str | None:
        """Why the replicas do not start; None while they may."""
        from ray import serve
        from ray.serve.schema import ApplicationStatus

        found = serve.status().applications.get(self.application)
        if found is None or found.status is not ApplicationStatus.DEPLOY_FAILED:
            return None
        return str(next((d.message for d in found.deployments.values() if d.message), found.message))

    def remove(self) -> None:
        """Begin to end the replicas: each stops accepting, drains and closes."""
        from ray import serve

        serve.delete(self.application, _blocking=False)

    def leave(self) -> None:
        """After the replicas have ended: end the Serve we started, unless somebody else uses it by now."""
        from ray import serve

        if self.owns_serve and not (serve.status().applications.keys() - {self.application}):
            serve.shutdown()


def _logging_config() -> dict[str, Any]:
    return {"enable_access_log": False, "log_level": "WARNING"}


__all__ = ["Endpoint", "GatewayReplica"]
