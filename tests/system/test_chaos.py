"""A few faults on a real cluster; ``kage chaos`` is the same with more of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kagemusha.chaos.faults import ChaosFault
from kagemusha.demo.sides import kage_program

pytestmark = [
    pytest.mark.system,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]
AT_SWITCH = (
    ChaosFault.KILL_SWITCH_GATE,
    ChaosFault.CUT_BETWEEN_PRIMARY_AND_ARBITER,
    ChaosFault.KILL_PRIMARY_QEMU,
)


def report_of(tmp_path: Path, *more: str) -> dict[str, Any]:
    report = tmp_path / "chaos.json"
    command = [kage_program(), "chaos", *more, "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(report.read_text()))


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("host", ("--runs", "2", "--seed", "11")),
        pytest.param(
            *("switch", ("--runs", "3", "--seed", "7", "--faults", ",".join(map(str, AT_SWITCH)))),
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_a_few_faults_show(tmp_path: Path, form: str, more: tuple[str, ...]) -> None:
    found = report_of(tmp_path, "--form", form, *more)
    assert (found["form"], found["runs"], found["ok"]) == (form, int(more[1]), int(more[1]))
    assert found["frames"] > 100
    assert [found[key] for key in ("lost", "leaked", "double_active", "damaged", "not_at_rest")] == [0] * 5
    assert found["acknowledged"] > 50


def test_faults_are_chosen_by_words() -> None:
    done = subprocess.run([kage_program(), "chaos", "--faults", "flood"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no such fault" in done.stderr
    assert ChaosFault.KILL_ARBITER.value in done.stderr
