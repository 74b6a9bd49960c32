"""From a config to a router, in the process that runs it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cluster.recorder import FileRecorder, RecordSpec
from protocol.errors import ConfigError
from router.config import RouterConfig
from router.service import RouterService


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """All a router process is told. Travels by Ray (private to the cluster), never over our own sockets."""

    config: RouterConfig
    directory_host: str
    directory_port: int
    secret: bytes
    seed: int
    notes: tuple[str, ...] = ()  # what whoever starts it has to say, until the policy is switched
    name: str = "router-0"
    record: RecordSpec | None = None  # None: its events are not written down


def build_router(spec: RouterSpec) -> RouterService:
    """`await service.start()` opens its port and joins the cluster.

    Raises:
        ConfigError: the config names no policy that can be loaded, or a directory for records that cannot be written.
    """
    epoch = time.time_ns()
    recorder: FileRecorder | None = None
    if spec.record is not None:
        try:
            recorder = FileRecorder(spec.record, name=spec.name, epoch=epoch, seed=spec.seed, config=spec.config)
        except OSError as error:
            folder = spec.record.folder
            raise ConfigError(f"recording.dir {folder} cannot be written: {error.strerror}; name a directory of yours") from None
    return RouterService(
        spec.config,
        directory_host=spec.directory_host,
        directory_port=spec.directory_port,
        secret=spec.secret,
        epoch=epoch,
        seed=spec.seed,
        notes=spec.notes,
        name=spec.name,
        recorder=recorder,
    )


def least_work_instead(config: RouterConfig) -> RouterConfig:
    """For a router that follows one whose policy did not return: any policy of the config may be the one."""
    return replace(config, policy="least_work", decode_policy="")


HUNG_NOTE = "the router before stood still, as with a policy that does not return: least_work places until a policy is chosen anew"
