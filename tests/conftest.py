"""Rules for the whole test run: in CI a test may be skipped only for what its host lacks.

A skip is a test that shows nothing. With ``CI=true`` a skip whose reason does not begin with ``host lacks:``
fails the run, so no promise loses its evidence unseen.
"""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

ALLOWED_REASON = "host lacks:"
_unexpected_skips: list[str] = []

# A machine that stands still for a moment is no fault of what is tested.
settings.register_profile("kagemusha", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kagemusha")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a shell without job control; commands under test would inherit it and not end.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(ALLOWED_REASON):
        _unexpected_skips.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if os.environ.get("CI") == "true" and _unexpected_skips and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("CI") == "true" and _unexpected_skips:
        terminalreporter.section("skips that CI does not allow", red=True)
        for skip in _unexpected_skips:
            terminalreporter.line(skip)
