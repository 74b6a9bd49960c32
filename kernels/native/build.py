"""Compiles the native kernels into one shared library with whatever C++ compiler there is. Needs nothing but Python.

    python -m kernels.native.build [--sanitize]

The package's build (setup.py) calls `build_library`; a machine without a compiler goes without.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "src"
LIBRARY_NAME = "libbaton_native.so"
COMPILE_TIMEOUT_S = 300.0
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread",
    "-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized",  # both: gcc's own vector headers
)  # fmt: skip
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512")
PATH_FLAGS = {
    "path_avx512_bf16": (*AVX512, "-mavx512bf16"),
    "path_avx512": AVX512,
    "path_avx2": ("-mavx2", "-mfma"),
    "path_portable": (),
}
COMMON_SOURCES = ("threads", "memory", "packed_linear", "experts", "network", "sampling", "interface", "copy", "socket_runs")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1")


class CompileFailed(Exception):
    """There is no compiler, or it does not take the sources; the text is its own."""


def build_library(target_dir: Path, *, sanitize: bool = False) -> Path:
    """Compile into `target_dir`/libbaton_native.so, which appears whole or not at all; returns its path.

    CXX and CXXFLAGS count as usual. sanitize: for AddressSanitizer and UndefinedBehaviorSanitizer, whose runtime the process preloads.

    Raises:
        CompileFailed: see there.
    """
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    paths = PATH_FLAGS if is_x86 else {"path_portable": ()}
    sources: dict[str, tuple[str, ...]] = {**dict.fromkeys(COMMON_SOURCES, ()), **paths}
    flags = [*FLAGS, *(SANITIZE if sanitize else ()), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    target_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target_dir, prefix=".build-") as scratch:

        def compile_one(name: str) -> str:
            result = f"{scratch}/{name}.o"
            _run([*compiler, *flags, *sources[name], "-c", str(SOURCE_DIR / f"{name}.cpp"), "-o", result])
            return result

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sorted(sources, reverse=True)))
        made = Path(scratch) / LIBRARY_NAME
        _run([*compiler, *flags, "-shared", *objects, "-o", str(made)])
        return made.rename(target_dir / LIBRARY_NAME)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)  # noqa: S603 our own words
    except FileNotFoundError:
        raise CompileFailed(f"no C++ compiler: {command[0]} is not installed; install g++ or name one in CXX") from None
    except subprocess.TimeoutExpired:
        raise CompileFailed(f"{command[0]} took more than {COMPILE_TIMEOUT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        raise CompileFailed(f"{shlex.join(command)} failed:\n{error.stderr[-2000:]}") from None


def main() -> None:
    """Build into the source tree, where `kernels.native.library` looks."""
    parser = argparse.ArgumentParser(description="Compile the native kernels.")
    parser.add_argument("--sanitize", action="store_true", help="for AddressSanitizer; run with LD_PRELOAD of its runtime")
    parser.add_argument("--target", type=Path, default=Path(__file__).parent, help="directory for the library")
    arguments = parser.parse_args()
    try:
        build_library(arguments.target, sanitize=arguments.sanitize)
    except CompileFailed as failure:
        raise SystemExit(str(failure)) from None


if __name__ == "__main__":
    main()
