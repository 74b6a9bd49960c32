"""Whole servers as they are measured: ours and `vllm serve`, each in a session of its own, still while another has its turn."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from baton.bench.peers import SCRIPTS
from baton.bench.processor_time import pids_of
from baton.bench.report import TREE
from protocol.errors import ConfigError, ServiceError

READY_TIMEOUT_S = 600.0  # vLLM takes 30 to 50 s on two idle cores, minutes on busy ones
AWAKE_TIMEOUT_S = 30.0
STILL_TIMEOUT_S = 5.0
END_TIMEOUT_S = 20.0
POLL_S = 0.05
LOG_CHARS = 2000
SERVED_NAME = "measured"
KV_CACHE_GIB = 1
VLLM_SCRIPT = SCRIPTS / "vllm_serve.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCommand:
    """How one server is started. `ready_path` answers 200 once requests can be sent."""

    name: str  # "baton", "vllm-512"
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    port: int
    ready_path: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def our_server(model_dir: Path, folder: Path, *, threads: int) -> ServerCommand:
    """`baton serve` with one prefill and one decode worker, `threads` compute threads each, and its own defaults otherwise."""
    told = [str(model_dir), "--prefill-workers", "1", "--decode-workers", "1", "--threads", str(threads)]
    return _baton_serve([*told, "--kv-cache-memory-bytes", f"{KV_CACHE_GIB}GiB"], folder)


def configured_server(config: Mapping[str, object], folder: Path, *, niceness: int = 0) -> ServerCommand:
    """`baton serve` with this configuration, which is written into `folder`.

    niceness: above 0 a client on the same cores goes before it, and sends when it means to.
    """
    file = folder / "cluster.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = _baton_serve(["--config", str(file)], folder)
    return replace(command, argv=("nice", "-n", str(niceness), *command.argv)) if niceness else command


def _baton_serve(told: Sequence[str], folder: Path) -> ServerCommand:
    """Found by `read_run_files` of `folder` alone, and by no `baton status` of this user."""
    port = _free_port()
    argv = [sys.executable, "-P", "-m", "baton", "serve", *told, "--served-model-name", SERVED_NAME, "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BATON_", "RAY_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(TREE), *filter(None, [environment.get("PYTHONPATH")])])
    environment["XDG_RUNTIME_DIR"] = str(folder)
    return ServerCommand(name="baton", argv=tuple(argv), environment=environment, port=port, ready_path="/ready")


def vllm_server(python: Path, model_dir: Path, *, threads: int, max_model_len: int, max_num_batched_tokens: int | None) -> ServerCommand:
    """`vllm serve`, prefill and decode in one engine of `threads` threads. max_num_batched_tokens None: vLLM's default.

    Raises:
        ConfigError: the script that starts it is not here.
    """
    if not VLLM_SCRIPT.exists():
        raise ConfigError(f"{VLLM_SCRIPT} is not there: peers are measured from a source tree, not from an installed wheel")
    port = _free_port()
    argv = [str(python), "-P", str(VLLM_SCRIPT), str(model_dir), str(port), str(threads), str(KV_CACHE_GIB)]
    argv += ["--served-model-name", SERVED_NAME, "--dtype", "bfloat16", "--max-model-len", str(max_model_len), "--max-num-seqs", "64"]
    if max_num_batched_tokens is not None:
        argv += ["--max-num-batched-tokens", str(max_num_batched_tokens)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment |= {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    name = "vllm" if max_num_batched_tokens is None else f"vllm-{max_num_batched_tokens}"
    return ServerCommand(name=name, argv=tuple(argv), environment=environment, port=port, ready_path="/v1/models")


class ServerProcess:
    """One running server and everything it started. Whoever made it stops it; used as a context manager it ends with the block."""

    def __init__(self, command: ServerCommand, *, log: Path) -> None:
        """Started, and not waited for. `log` takes what it writes; it is new."""
        self.command = command
        self.start_s: float | None = None  # from the start to the first answer, once there was one
        self._log = log
        self._started_s = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603
                command.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(command.environment),
                cwd=log.parent,
                start_new_session=True,
            )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def session(self) -> int:
        return self._process.pid

    def wait_ready(self) -> None:
        """
        Raises:
            ServiceError: it ended, or did not answer in time; with the end of its log.
        """
        self._wait_for_answer(READY_TIMEOUT_S)
        self.start_s = time.monotonic() - self._started_s

    def pause(self) -> None:
        """Hold all its processes still: an idle server has threads that wake up, and some that spin."""
        self._signal(signal.SIGSTOP)
        deadline_s = time.monotonic() + STILL_TIMEOUT_S
        while any(map(_runs, pids_of([self.session]))) and time.monotonic() < deadline_s:  # a process stops when it is next scheduled
            time.sleep(POLL_S)

    def resume(self) -> None:
        """Let it go on, and wait until it answers."""
        self._signal(signal.SIGCONT)
        self._wait_for_answer(AWAKE_TIMEOUT_S)

    def stop(self) -> None:
        self._signal(signal.SIGCONT)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        for _ in range(2):  # a process may be born between the listing and the signal
            self._signal(signal.SIGKILL)
        self._process.wait(END_TIMEOUT_S)

    def _wait_for_answer(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not self._answers():
            if self._process.poll() is not None:
                raise ServiceError(f"{self.name} ended with {self._process.returncode}: {self._last_words()}")
            if time.monotonic() > deadline_s:
                raise ServiceError(f"{self.name} did not answer within {timeout_s:.0f} s: {self._last_words()}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.command.port, timeout=2.0)
        try:
            connection.request("GET", self.command.ready_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in pids_of([self.session]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace").strip()[-LOG_CHARS:] or "it said nothing"


def checkpoint_to_serve(name: str, folder: Path) -> Path:
    """The built-in demo model, a random checkpoint of a shape with a tokenizer (made in `folder`), or the directory that is named.

    Raises:
        ConfigError: it is none of them.
    """
    from baton.bench.models import make_checkpoint, read_model, resolve_model
    from engine.demo import DEMO_MODEL_DIR

    if name == "demo":
        return DEMO_MODEL_DIR
    model = resolve_model(name)
    if isinstance(model, Path):
        return model
    directory = make_checkpoint(model, folder)
    add_tokenizer(directory, read_model(directory).vocab_size)
    return directory


def add_tokenizer(model_dir: Path, vocab_size: int) -> None:
    """Files of a byte-level tokenizer with `vocab_size` tokens, so that a checkpoint of random weights can be served.

    Beyond the bytes its tokens are pairs of bytes; nobody reads its texts.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: vocab_size - len(special) - len(letters)]
    names = [*special, *letters, *(a + b for a, b in pairs)]
    assert len(names) == vocab_size, f"{vocab_size} tokens are more than bytes and pairs of bytes make"
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(model_dir / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))


def _runs(pid: int) -> bool:
    """Neither stopped by a signal nor over."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "TZX"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = [
    "SERVED_NAME",
    "ServerCommand",
    "ServerProcess",
    "add_tokenizer",
    "checkpoint_to_serve",
    "configured_server",
    "our_server",
    "vllm_server",
]
