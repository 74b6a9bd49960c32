"""From what a user calls a model to a directory with its checkpoint: a local one as it is, a Hugging Face Hub id through its cache.

Torch-free. Only safetensors, JSON and templates are fetched: no pickle, no code. Every failure is one sentence with the remedy.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from pathlib import Path
from urllib.parse import urlsplit

from protocol.errors import ConfigError, ModelUnavailable

log = logging.getLogger("baton.hub")

ALLOWED_FILES = ("*.safetensors", "*.json", "*.jinja")
IGNORED_FILES = ("*/*", "consolidated*.safetensors")  # other formats of the same weights: onnx/, original/, Mistral's own
ASK_TIMEOUT_S = 10.0  # a Hub that says nothing for this long counts as out of reach
DEFAULT_ENDPOINT = "https://huggingface.co"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_model(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    offline: bool = False,
    endpoint: str | None = None,
) -> Path:
    """The directory of checkpoint `name`, downloaded first where it has to be (with a progress bar on stderr).

    A Hub id that is in the cache needs no network: the Hub is asked whether it moved on, and if it cannot be reached the cached
    copy is used with a warning. A commit in the cache is not asked for at all.

    cache_dir: None: $HF_HOME/hub. token: None: that of `hf auth login`, if any. endpoint: None: huggingface.co.

    Raises:
        ModelUnavailable: unknown or gated id, unknown revision, no network, full disk, or no safetensors in it.
        ConfigError: a revision of a directory.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ConfigError(f"{name} is a directory and has no revision {revision}; leave --revision out")
        return _complete(directory.resolve(), name)
    if directory.exists():
        raise ModelUnavailable(f"{name} is a file; name the directory that holds config.json and *.safetensors")
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise ModelUnavailable(f"no directory {name}, and it cannot be a Hub id (ORGANISATION/MODEL); check the path")
    return _Download(name, revision, cache_dir, token, endpoint).run(offline=offline)


class _Download:
    """One checkpoint on its way from the Hub to the cache."""

    def __init__(self, name: str, revision: str | None, cache_dir: Path | None, token: str | None, endpoint: str | None) -> None:
        from huggingface_hub import HfApi, constants

        self._name = name
        self._revision = revision
        self._endpoint = endpoint or constants.ENDPOINT
        self._host = urlsplit(self._endpoint).netloc or self._endpoint
        self._cache_dir = Path(cache_dir or constants.HF_HUB_CACHE)
        self._hub = HfApi(endpoint=self._endpoint, token=token, library_name="baton")

    def run(self, *, offline: bool) -> Path:
        cached = self._cached()
        if cached is not None and (offline or _COMMIT.fullmatch(self._revision or "")):
            return cached
        if offline:
            where = f"{self._cache_dir} and HF_HUB_OFFLINE is set"
            raise ModelUnavailable(f"{self._what} is not in {where}; unset it for one start, or name a directory")
        refusal = self._ask()
        if refusal is None:
            return _complete(self._fetch(), self._what)
        if cached is None:
            raise refusal
        log.warning("%s; using the cached copy %s", refusal, cached)
        return cached

    @property
    def _what(self) -> str:
        return self._name if self._revision is None else f"{self._name} at revision {self._revision}"

    def _cached(self) -> Path | None:
        """The snapshot in the cache when all its weights are there."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return _complete(self._snapshot(local_files_only=True), self._what)
        except (LocalEntryNotFoundError, ModelUnavailable):
            return None

    def _ask(self) -> ModelUnavailable | None:
        """None when the Hub knows the model and would give it to us."""
        from huggingface_hub.errors import HTTPError  # of the HTTP client behind the Hub's; the root of what it raises

        try:
            self._hub.model_info(self._name, revision=self._revision, timeout=ASK_TIMEOUT_S)
        except (HTTPError, OSError) as error:
            return self._explain(error)
        return None

    def _fetch(self) -> Path:
        from huggingface_hub.errors import HTTPError

        try:
            return self._snapshot(local_files_only=False)
        except (HTTPError, OSError) as error:
            raise self._explain(error) from error

    def _snapshot(self, *, local_files_only: bool) -> Path:
        return Path(
            self._hub.snapshot_download(
                self._name,
                revision=self._revision,
                cache_dir=self._cache_dir,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(IGNORED_FILES),
                etag_timeout=ASK_TIMEOUT_S,
                local_files_only=local_files_only,
            )
        )

    def _explain(self, error: Exception) -> ModelUnavailable:
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            page = f"{self._endpoint}/{self._name}"
            return ModelUnavailable(f"{self._name} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account")
        if isinstance(error, RepositoryNotFoundError):
            remedy = "check the spelling, or set HF_TOKEN if it is private"
            return ModelUnavailable(f"{self._name} is neither a directory here nor a model on {self._host}; {remedy}")
        if isinstance(error, RevisionNotFoundError):
            return ModelUnavailable(f"{self._name} has no revision {self._revision}; name a branch, tag or commit of it")
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
            return ModelUnavailable(f"{self._host} answered {status} for {self._what}; try again later, or name a directory")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ModelUnavailable(f"no space left in {self._cache_dir} for {self._what}; free some, or set HF_HOME to a larger disk")
        if isinstance(error, PermissionError):
            return ModelUnavailable(f"{self._cache_dir} cannot be written; make it yours, or set HF_HOME to a directory that is")
        remedy = "connect, or name a directory"
        return ModelUnavailable(f"cannot reach {self._host} for {self._what}, which is not in the cache ({type(error).__name__}); {remedy}")


def _complete(directory: Path, name: str) -> Path:
    """`directory`, when a whole checkpoint is in it.

    Raises:
        ModelUnavailable: config.json or weights are missing.
    """
    if not (directory / "config.json").is_file():
        raise ModelUnavailable(f"{name} has no config.json; name a Hugging Face checkpoint")
    present = {path.name for path in directory.glob("*.safetensors")}
    if missing := sorted(_shards(directory) - present):
        raise ModelUnavailable(f"{name} lacks {len(missing)} of its weight files, {missing[0]} first; fetch it again")
    if present:
        return directory
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise ModelUnavailable(f"{name} has its weights as pickle files only, which are never read; convert them to safetensors")
    raise ModelUnavailable(f"{name} has no *.safetensors; name a checkpoint whose weights are safetensors")


def _shards(directory: Path) -> set[str]:
    """The weight files the index names; none where there is no index."""
    try:
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        return {str(shard) for shard in index["weight_map"].values()}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelUnavailable(f"{directory}/model.safetensors.index.json is damaged; fetch the checkpoint again") from None
