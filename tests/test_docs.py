"""Every fenced block of README and docs runs.

bash and python blocks run as they stand, against a live server whose port takes the place of 8000. yaml blocks go through the
loader that `baton serve --config` uses. `text` is pictures and output. A line `<!-- runs in FILE -->` above a block says that FILE
runs it, and each of its lines is looked for there; `<!-- shown, not run: REASON -->` is for what needs a checkpoint or another machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.serving import Serving, environment

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:^<!-- (?P<remark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    remark: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}:{self.language}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("code")),
            language=match["language"],
            code=match["code"],
            remark=match["remark"] or "",
        )
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
ELSEWHERE = [block for block in BLOCKS if block.remark.startswith("runs in ")]
LIVE = [block for block in BLOCKS if block.language in ("bash", "python") and not block.remark.startswith(("runs in ", "shown, not run: "))]
SETTINGS = [block for block in BLOCKS if block.language == "yaml"]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    """Seen to fail with a block without a language."""
    assert len(BLOCKS) >= 8
    assert not [str(block) for block in BLOCKS if block.language not in ("bash", "python", "yaml", "text")]
    assert sum(page.read_text().count("\n```") + page.read_text().startswith("```") for page in PAGES) == 2 * len(BLOCKS)


@pytest.mark.parametrize("block", ELSEWHERE, ids=str)
def test_block_runs_where_it_says(block: Block) -> None:
    runner = (ROOT / block.remark.removeprefix("runs in ")).read_text()
    for line in block.code.strip().splitlines():
        assert re.search(rf"^\s*{re.escape(line)}\b", runner, re.MULTILINE), (
            f"{line!r} is not run by {block.remark.removeprefix('runs in ')}"
        )


@pytest.mark.parametrize("block", SETTINGS, ids=str)
def test_yaml_is_accepted_by_the_loader(block: Block, tmp_path: Path) -> None:
    from control.config import load_config

    file = tmp_path / "cluster.yaml"
    file.write_text(block.code)
    load_config(file=file)


def test_files_that_pages_name_exist() -> None:
    """A path in backquotes that begins with a folder of the house. Seen to fail with `protocol/nothing.py` in a page."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+/[\w./-]*)`", page.read_text()):
            if name.partition("/")[0] in folders:
                assert (ROOT / name).exists(), f"{page.relative_to(ROOT)} names {name}, which does not exist"


@pytest.mark.cluster
@pytest.mark.parametrize("block", LIVE, ids=str)
def test_block_runs_as_it_stands(block: Block, serving: Serving, tmp_path: Path) -> None:
    command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
    outcome = subprocess.run(
        [*command, block.code.replace("127.0.0.1:8000", f"127.0.0.1:{serving.port}")],
        cwd=ROOT,
        env=active(serving),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert outcome.returncode == 0, f"{block}\n{outcome.stdout[-2000:]}\n{outcome.stderr[-2000:]}"
    assert outcome.stdout.strip(), f"{block} printed nothing"


def active(serving: Serving) -> dict[str, str]:
    """This interpreter's scripts first on the path, as with the environment active, and the live server the only one to be found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**environment(serving.folder), "PATH": path}
