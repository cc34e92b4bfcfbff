"""What is seen while weights are loaded."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from wicore.engine.tensorrt.build import WeightsProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_a_bar_that_reaches_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = WeightsProgress()
    for done in (0, 40_000_000, 100_000_000):
        progress(done, 100_000_000)
    last = terminal.getvalue().rsplit("\r", 1)[-1]
    assert "weights: 100%" in last
    assert "100M/100M" in last


def test_a_log_has_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    progress = WeightsProgress(every_s=0.0)
    with caplog.at_level(logging.INFO, "wicore.engine"):
        progress(500_000_000, 2_000_000_000)
    assert caplog.messages == ["weights: 0.5 of 2.0 GB"]


def test_a_quick_load_leaves_no_line(caplog: pytest.LogCaptureFixture) -> None:
    progress = WeightsProgress(every_s=3600.0)
    with caplog.at_level(logging.INFO, "wicore.engine"):
        progress(1, 2)
    assert not caplog.messages
