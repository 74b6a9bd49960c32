"""Which module serves as UCX; the modules here are empty, since only the rule is looked at."""

from __future__ import annotations

import os
import sys
from types import ModuleType

import pytest

from kvtransfer import ucx
from protocol.errors import ConfigError

pytestmark = pytest.mark.pure


@pytest.fixture
def no_ucx(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("ucxx", "ucp"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it says ModuleNotFoundError
    for name in [name for name in os.environ if name.startswith("UCX")]:
        monkeypatch.delenv(name)
    return monkeypatch


def test_ucp_serves_where_ucxx_is_not_installed(no_ucx: pytest.MonkeyPatch) -> None:
    """Fails when "ucp" is left out of the names, or comes first (both planted)."""
    ucxx, ucp = ModuleType("ucxx"), ModuleType("ucp")
    no_ucx.setitem(sys.modules, "ucp", ucp)
    assert ucx.import_ucx() is ucp
    no_ucx.setitem(sys.modules, "ucxx", ucxx)
    assert ucx.import_ucx() is ucxx


def test_without_either_the_remedy_is_named(no_ucx: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'baton-serve\[ucx\]'"):
        ucx.import_ucx()


def test_shared_memory_goes_with_error_handling_unless_the_user_says_otherwise(no_ucx: pytest.MonkeyPatch) -> None:
    """Fails when the environment is set after the import, or over the user's (planted)."""
    no_ucx.setenv("UCX_CMA_MEMORY_INVALIDATE", "n")
    with pytest.raises(ConfigError):
        ucx.import_ucx()
    assert os.environ["UCX_MM_ERROR_HANDLING"] == "y"
    assert os.environ["UCX_CMA_MEMORY_INVALIDATE"] == "n"
