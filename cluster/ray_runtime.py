"""The Ray under a run: one of our own that ends with us, or one that was there before and stays.

Our own is private: every port on loopback, token authentication with a secret of this run, no dashboard, no usage statistics,
no autoscaler. Joining, we get a namespace and remove what we started; we never run `ray stop`, which ends every Ray on a machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType

from cluster.processes import ProcessId, descendants, kill_all, working_under
from cluster.run_directory import RunDirectory
from protocol.errors import ConfigError, ServiceError

log = logging.getLogger("baton.cluster")

LOGICAL_CPUS = 1024.0  # our actors ask for slivers of it: Ray must never make one wait, packing is ours
OBJECT_STORE_BYTES = 80 << 20  # nothing of ours travels through it; Ray's least is 75 MiB
CONNECT_TIMEOUT_S = 10.0
END_GRACE_S = 3.0  # ray.shutdown() takes 1.2-2.0 s on a quiet machine of two cores

Guard = Callable[[], AbstractContextManager[None]]

# Ray reads these when its modules are imported, in this process and in those it starts.
_OWN_RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the only switch by which Ray takes 127.0.0.1 for its own address, and binds there
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_event_stats": "0",
    "RAY_worker_niceness": "0",  # else 15: what serves would yield to Ray's own processes and to everybody else's
    "AUTOSCALER_METRIC_PORT": "0",  # two runs on one machine must not fight for fixed ports
    "DASHBOARD_METRIC_PORT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # do not hide GPUs from actors that did not ask Ray for them
}
# Serve's throughput-optimised mode, less what listens outside loopback or beside our port (cluster/serve_app.py).
_SERVE = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
}

_SET_BY_RAY = ("RAY_CLIENT_MODE", "PYTHONBREAKPOINT")  # in this process; put back with ours


class RayRuntime:
    """A connection of this process to a Ray cluster. One at a time: Ray keeps its connection in module globals."""

    def __init__(self, *, owned: bool, namespace: str, address: str, run: RunDirectory, environ: dict[str, str | None]) -> None:
        self.owned = owned
        self.namespace = namespace
        self.address = address
        self._run = run
        self._environ = environ  # what our variables were before
        self._servers = [p for p in self.processes if "gcs_server" in p.title or "raylet" in p.title.split(" ")[0]]

    @classmethod
    def start(cls, run: RunDirectory, *, namespace: str, temp_dir: Path | None = None, guard: Guard = nullcontext) -> RayRuntime:
        """A Ray of our own, on loopback. Takes 2-3 s on a quiet machine of two cores.

        Called on the main thread of a process: Ray's processes end with the thread that started them. An interrupt may come
        while `guard` is entered; then nothing is left.
        """
        environ = _set_environ({**_OWN_RAY, **_SERVE, "RAY_AUTH_TOKEN_PATH": str(run.write_token())})
        try:
            with _working_in(run.cwd), _handlers_kept():
                import ray

                _refuse_second_connection(ray)
                _read_environ_again()
                with _own_ray_parameters(), guard():
                    context = ray.init(
                        address="local",
                        namespace=namespace,
                        num_cpus=int(LOGICAL_CPUS),
                        object_store_memory=OBJECT_STORE_BYTES,
                        include_dashboard=False,
                        log_to_driver=False,
                        configure_logging=False,
                        logging_level=logging.ERROR,
                        _temp_dir=str(temp_dir or run.ray),
                    )
        except BaseException:
            cls._abandon(run)
            _restore_environ(environ)
            raise
        _quiet()
        return cls(owned=True, namespace=namespace, address=context.address_info["gcs_address"], run=run, environ=environ)

    @classmethod
    def join(cls, run: RunDirectory, address: str, *, namespace: str, guard: Guard = nullcontext) -> RayRuntime:
        """Connect to a Ray that runs already.

        Raises:
            ConfigError: nobody answers there within 10 s, or it refuses us.
        """
        environ = _set_environ({"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": str(int(CONNECT_TIMEOUT_S))})
        try:
            with _working_in(run.cwd), _handlers_kept():
                import ray

                _refuse_second_connection(ray)
                context = ray.init(
                    address=address, namespace=namespace, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            _restore_environ(environ)
            raise ConfigError(
                f"cannot join the Ray at {address} (--ray-address or RAY_ADDRESS): {error}; leave it out to start one"
            ) from error
        except BaseException:
            _restore_environ(environ)
            raise
        _quiet()
        return cls(owned=False, namespace=namespace, address=context.address_info["gcs_address"], run=run, environ=environ)

    def check(self) -> None:
        """
        Raises:
            ServiceError: a server of our own Ray has ended; nothing can be started or replaced any more.
        """
        ended = [p for p in self._servers if not p.is_alive]
        if ended:
            raise ServiceError(f"Ray's process {ended[0].pid} ended; see the logs below {self._run.ray}")

    @property
    def processes(self) -> list[ProcessId]:
        """Of our own Ray: its servers and what they started, whoever is their parent by now. Empty when joined."""
        return _processes_of(self._run) if self.owned else []

    def stop(self, *, deadline_s: float) -> list[ProcessId]:
        """Disconnect; of our own Ray end every process. Returns who still lives at the deadline (nobody, as a rule).

        `ray.shutdown` is given `END_GRACE_S`, then processes are killed by pid and start time: it must not hang a stop.
        """
        import ray

        end_s = time.monotonic() + deadline_s
        mine = set(self.processes)
        ending = threading.Thread(target=_shutdown_ray, args=(ray,), name="baton-ray-shutdown", daemon=True)
        ending.start()
        ending.join(timeout=min(END_GRACE_S, deadline_s))
        if ending.is_alive():
            log.warning("ray.shutdown() took more than %g s; ending its processes", END_GRACE_S)
        left = kill_all(mine | set(self.processes), grace_s=0.0, deadline_s=max(0.5, end_s - time.monotonic()))
        ending.join(timeout=1.0)
        _restore_environ(self._environ)
        return left

    @staticmethod
    def _abandon(run: RunDirectory) -> None:
        """The start was interrupted or failed half-way: end what it left."""
        with contextlib.suppress(Exception):
            import ray

            ray.shutdown()
        kill_all(_processes_of(run), grace_s=0.0, deadline_s=3.0)


def _processes_of(run: RunDirectory) -> list[ProcessId]:
    """Every process of our own Ray works in the run's directory; so does what it starts, or it is a child of one that does."""
    found = {p for p in working_under(run.path) if p.pid != os.getpid()}
    for process in list(found):
        found.update(descendants(process.pid))
    return sorted(found)


def _shutdown_ray(ray: object) -> None:
    with contextlib.suppress(Exception):  # the connection may be broken already: that is why we end it
        ray.shutdown()  # type: ignore[attr-defined]


def _refuse_second_connection(ray: object) -> None:
    if ray.is_initialized():  # type: ignore[attr-defined]
        raise ServiceError("this process is connected to a Ray already; call ray.shutdown() first, or give its address as ray.address")


def _set_environ(values: dict[str, str]) -> dict[str, str | None]:
    before = {name: os.environ.get(name) for name in (*values, *_SET_BY_RAY)}
    os.environ.update(values)
    return before


def _restore_environ(before: dict[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _read_environ_again() -> None:
    """A process that imported Ray before us has read the variables already."""
    import ray._raylet as compiled
    from ray._private import ray_constants

    ray_constants.ENABLE_RAY_CLUSTER = False
    compiled.Config.initialize("")  # type: ignore[attr-defined]
    compiled.AuthenticationTokenLoader.instance().reset_cache()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _own_ray_parameters() -> Iterator[None]:
    """Parameters of a head that `ray.init` has no argument for.

    The agent's HTTP port is 52365 by default: a second Ray on the machine would try five seconds for it. The autoscaler's
    monitor and the log monitor have nothing to do for us; without them a start is 1 s of CPU and 95 MB of PSS cheaper. Nor has the
    dashboard's server, which Ray starts without a dashboard too and waits for before it goes on: 0.8 s of CPU, 70 MB.
    In a process group of its own, Ray does not get the Ctrl-C or `kill -- -PGID` that is meant for us: we drain first.
    """
    from ray._private import parameter, services

    original = parameter.RayParams.__init__
    popen = services.ConsolePopen
    start_api_server = services.start_api_server

    def leaner(self: object, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("dashboard_agent_listen_port", 0)
        kwargs.setdefault("no_monitor", True)
        kwargs.setdefault("include_log_monitor", False)
        original(self, *args, **kwargs)

    parameter.RayParams.__init__ = leaner
    services.ConsolePopen = functools.partial(popen, process_group=0)
    services.start_api_server = _no_api_server
    try:
        yield
    finally:
        parameter.RayParams.__init__ = original
        services.ConsolePopen = popen
        services.start_api_server = start_api_server


def _no_api_server(*args: object, **kwargs: object) -> tuple[None, None]:
    """As Ray's own where the server does not come up: no address and no process."""
    return None, None


@contextlib.contextmanager
def _working_in(directory: Path) -> Iterator[None]:
    """Ray puts the driver's working directory first on every worker's path: give it an empty one."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it was removed meanwhile
            os.chdir(before)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """The caller's signal handlers stay. `ray.init` installs one for SIGTERM in Python, and in C++ one that aborts 3 s later."""
    from ray._private import utils

    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = _ignore_handler
    try:
        yield
    finally:
        utils.set_sigterm_handler = original
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # as Python knows it, over what C++ has put there


def _ignore_handler(handler: Callable[[int, FrameType | None], None]) -> None:
    pass


def _quiet() -> None:
    """Ray prints a paragraph for every actor that died, in colour, wherever stdout goes: the supervisor says so in a line."""
    from ray._private import worker

    worker.print_to_stdstream = _to_log
    logging.getLogger("ray").setLevel(logging.ERROR)


def _to_log(data: dict[str, object], ignore_prefix: bool = False) -> None:
    log.debug("Ray says", extra={"lines": data.get("lines")})


__all__ = ["LOGICAL_CPUS", "RayRuntime"]
