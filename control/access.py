"""How an operator on this machine is let in: a file of one run that says where its directory listens, with the cluster secret.

It lies in the run's private directory (mode 0700), is readable by its user alone (0600) and is gone with the run. Who can read it can
attach to the run's processes anyway; no port is opened for it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import ConfigError

SCHEMA = "baton.access.v1"
FILE_BYTES_MAX = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Everybody else of the cluster is found through its directory."""

    directory_host: str
    directory_port: int
    secret: bytes = field(repr=False)


def write_access(access: Access, path: Path) -> None:
    """A new file, readable by us only."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"schema": SCHEMA, "host": access.directory_host, "port": access.directory_port, "secret": access.secret.hex()}, file)


def read_access(path: Path) -> Access:
    """
    Raises:
        ConfigError: there is none, or it is not ours to understand.
    """
    try:
        tree = json.loads(path.read_text()[:FILE_BYTES_MAX])
        if tree["schema"] != SCHEMA:
            raise ValueError(f"schema {tree['schema']}, not {SCHEMA}")
        return Access(directory_host=str(tree["host"]), directory_port=int(tree["port"]), secret=bytes.fromhex(tree["secret"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not let us in ({error}); only the user who runs the server on this machine can") from None
