"""Importing from the user's directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

SCRIPT = """
import sys
from router.policies.user_path import import_last_from
import_last_from(sys.argv[1])
import_last_from(sys.argv[1])
assert sum(type(f).__name__ == "LastResort" for f in sys.meta_path) == 1
import router.config, engine.core.config
import my_policy.inner
assert my_policy.inner.ANSWER == 42
try:
    import no_such_module_anywhere
except ModuleNotFoundError:
    print("as it should be")
"""


def test_a_users_module_is_found_and_hides_none_of_ours(tmp_path: Path) -> None:
    """The user has `router/` too, and ours are installed in editable mode. Fails when the directory is appended to sys.path."""
    for name, text in {"router": "raise RuntimeError('the user\\'s')", "engine": "raise RuntimeError", "my_policy": ""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "my_policy" / "inner.py").write_text("ANSWER = 42")
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert ran.stdout == "as it should be\n", ran.stderr
