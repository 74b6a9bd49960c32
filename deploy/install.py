"""`make install`: one environment with Baton, its dependencies and the torch build this machine can use.

    python3 deploy/install.py --venv .venv --torch auto

Needs nothing but Python 3.11 and its venv module. Everything is fetched by pip, so the user's pip configuration (mirrors,
proxies, find-links) holds. The one choice made here is the build of torch: without an NVIDIA driver the CUDA build would
bring about 3 GB of nvidia-* packages that nothing can use, so the CPU build is preferred and any other outcome is told first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_TIMEOUT_S = 3.0
OLDEST_PYTHON = (3, 11)


def main() -> None:
    arguments = parse_arguments()
    if sys.version_info < OLDEST_PYTHON:
        stop(f"Python {sys.version.split()[0]} is too old, 3.11 or newer is needed: make install PYTHON=python3.12")
    python = environment(arguments.venv)
    build = chosen_build(arguments.torch)
    with tempfile.TemporaryDirectory(prefix="baton-install-") as scratch:
        constraints = constraints_file(python, build, Path(scratch))
        options = ["-c", str(constraints), *index_options(build)]
        tell_torch(python, build, options, Path(scratch))
        target = f"{REPOSITORY}[{arguments.extras}]" if arguments.extras else str(REPOSITORY)
        pip(python, "install", "--progress-bar", "off", "-e", target, *options)
    tell_result(python, arguments.venv)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--venv", type=Path, default=REPOSITORY / ".venv", help="environment to create or to install into")
    parser.add_argument("--torch", choices=["auto", "cpu", "cuda", "keep"], default="auto", help="keep: leave the torch that is there")
    parser.add_argument("--extras", default="dev", help="extras of pyproject.toml, joined by commas")
    return parser.parse_args()


def environment(path: Path) -> Path:
    """The Python of the environment at `path`, which is created when it is not there."""
    python = path.absolute() / "bin" / "python"
    if python.exists():
        say(f"environment {path}: installing into it")
        return python
    say(f"environment {path}: creating it with Python {sys.version.split()[0]}")
    try:
        venv.create(path, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(path, ignore_errors=True)
        stop("this Python has no ensurepip; install it (Debian, Ubuntu: apt install python3-venv) and try again")
    # A pip older than 23.3 downloads a whole wheel to answer --dry-run; ours to upgrade, since we made the environment.
    upgraded = subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=False)
    if upgraded.returncode != 0:
        say("pip could not be upgraded; going on with the one Python brought")
    return python


def chosen_build(asked: str) -> str:
    """ "cpu", "cuda" or "keep"."""
    if asked != "auto":
        return asked
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        say("torch: an NVIDIA driver is here, taking the CUDA build (TORCH=cpu overrides)")
        return "cuda"
    say("torch: no NVIDIA driver here, taking the CPU build (TORCH=cuda overrides)")
    return "cpu"


def constraints_file(python: Path, build: str, scratch: Path) -> Path:
    """constraints.txt, or for "keep" a copy of it that pins the torch already installed."""
    if build != "keep":
        return CONSTRAINTS
    found = subprocess.run(
        [str(python), "-c", "from importlib.metadata import version; print(version('torch'))"], capture_output=True, text=True, check=False
    )
    if found.returncode != 0:
        stop("TORCH=keep, but this environment has no torch; install one first or use TORCH=cpu or TORCH=cuda")
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("torch==")]
    copy = scratch / "constraints.txt"
    copy.write_text("\n".join([*lines, f"torch=={found.stdout.strip()}", ""]))
    return copy


def index_options(build: str) -> list[str]:
    """pip options that bring the CPU build within reach, when its index answers."""
    if build != "cpu":
        return []
    if answers(f"{CPU_INDEX}/torch/"):
        return ["--extra-index-url", CPU_INDEX]
    say(f"torch: {CPU_INDEX} does not answer within {PROBE_TIMEOUT_S:.0f} s, passing it over")
    return []


def answers(url: str) -> bool:
    """Whether `url` can be read; a thread bounds the whole of it, name look-up included."""
    outcome: list[bool] = []

    def probe() -> None:
        try:
            with urllib.request.urlopen(url, timeout=PROBE_TIMEOUT_S) as reply:
                outcome.append(reply.status == 200)
        except (OSError, urllib.error.URLError):
            outcome.append(False)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_S)
    return outcome == [True]


def tell_torch(python: Path, build: str, options: list[str], scratch: Path) -> None:
    """Say which torch pip would bring, and from where, before anything large is fetched."""
    if build == "keep":
        say("torch: keeping the one installed")
        return
    report_path = scratch / "report.json"
    pip(python, "install", "--dry-run", "--quiet", "--report", str(report_path), "torch", *options)
    coming = {item["metadata"]["name"].lower(): item for item in json.loads(report_path.read_text())["install"]}
    if "torch" not in coming:
        say("torch: already installed and within constraints.txt")
        return
    version = coming["torch"]["metadata"]["version"]
    say(f"torch: fetching {version} from {coming['torch']['download_info']['url']}")
    nvidia = sorted(name for name in coming if name.startswith("nvidia-"))
    if build == "cpu" and nvidia:
        say(f"torch: the index reached has only the CUDA build, which brings {len(nvidia)} nvidia-* packages (about 3 GB):")
        say("       " + " ".join(nvidia))
        say(f"       to avoid them make {CPU_INDEX} reachable, or install a CPU build yourself and use TORCH=keep")
    if build == "cuda" and "+cpu" in version:
        say("torch: your pip configuration offers a CPU build before the CUDA one; install the CUDA build yourself and use TORCH=keep")


def tell_result(python: Path, path: Path) -> None:
    script = "from importlib.metadata import distributions; [print(d.name, d.version) for d in distributions()]"
    listed = subprocess.run([str(python), "-c", script], capture_output=True, text=True, check=True).stdout
    installed = dict(line.rsplit(" ", 1) for line in listed.splitlines() if " " in line)
    nvidia = [name for name in installed if name.startswith("nvidia-")]
    size_bytes = sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
    packages = f"{len(nvidia)} nvidia-* packages" if nvidia else "no nvidia-* packages"
    say(f"installed: torch {installed['torch']}, ray {installed['ray']}; {path} holds {size_bytes / 1e9:.2f} GB, {packages}")


def pip(python: Path, *arguments: str) -> None:
    """Run pip with its own output; its failure is ours."""
    try:
        subprocess.run([str(python), "-m", "pip", *arguments], check=True)
    except subprocess.CalledProcessError as failure:
        sys.exit(failure.returncode)


def say(line: str) -> None:
    print(line, flush=True)


def stop(line: str) -> None:
    sys.exit(f"make install: {line}")


if __name__ == "__main__":
    main()
