"""How our log lines read."""

from __future__ import annotations

import logging
import sys

import pytest

from cluster.event_log import FORMAT, EventFormatter, InfoAtMost

pytestmark = pytest.mark.pure


def line(name: str, **fields: object) -> str:
    record = logging.getLogger("elsewhere").makeRecord(name, logging.INFO, "f.py", 1, "attempt ended", (), None, extra=fields)
    return EventFormatter(FORMAT).format(record)


def test_fields_follow_the_event_and_odd_values_stand_in_quotes() -> None:
    """A value cannot pretend to be another field or another line. Seen to fail with `str` for `_shown`."""
    told = line("baton.gateway", request_id="ab12", attempt=0, ttft_s=0.25, reason='the "client"\nwent=away', worker_id=None, empty="")
    assert told.endswith(
        r'INFO baton.gateway attempt ended request_id=ab12 attempt=0 ttft_s=0.25 reason="the \"client\"\nwent=away" worker_id=- empty=""'
    )
    assert told.count("\n") == 0


def test_lines_of_others_are_left_as_they_are_and_a_traceback_comes_last() -> None:
    """Seen to fail with fields appended in `format`."""
    assert line("uvicorn.error", color="red").endswith("INFO uvicorn.error attempt ended")
    try:
        raise ValueError("boom")
    except ValueError:
        record = logging.getLogger("x").makeRecord("baton.x", 40, "f.py", 1, "broke", (), sys.exc_info(), extra={"request_id": "r"})
    first, *rest = EventFormatter(FORMAT).format(record).splitlines()
    assert first.endswith("ERROR baton.x broke request_id=r") and rest[-1] == "ValueError: boom"


def test_info_is_bounded_a_second_and_what_is_left_out_is_counted() -> None:
    """100 lines at one moment, then one each second. Seen to fail with `_left` never taken from, and with the count kept."""
    few = InfoAtMost(per_s=1.0, burst=10)

    def passes(at_s: float, level: int = logging.INFO) -> logging.LogRecord | None:
        record = logging.LogRecord("baton.x", level, "f.py", 1, "event", (), None)
        record.created = at_s
        return record if few.filter(record) else None

    assert sum(passes(100.0) is not None for _ in range(100)) == 10
    assert passes(100.0, logging.WARNING) is not None
    later = [passes(100.0 + n) for n in (1, 2)]
    assert [record.__dict__.get("lines_left_out") for record in later if record] == [90, None]
