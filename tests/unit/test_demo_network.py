"""The demo's network and directory: made for one run, gone after it, and after a run that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kagemusha.demo.processes import marked
from kagemusha.demo.rundir import MARK, RunDirectory, sweep
from kagemusha.demo.topology import Topology, inside, namespaces_with
from kagemusha.errors import TransientError

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces"),
]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    with RunDirectory(keep=False) as directory, Topology(directory.name) as made:
        yield made


def run(namespace: str, *command: str) -> str:
    return subprocess.run(inside(namespace, [*command]), check=True, capture_output=True, text=True).stdout


def test_the_hosts_reach_each_other_over_the_management_link(topology: Topology) -> None:
    listener = "import socket; s=socket.create_server(('10.78.0.2',7300)); print(1,flush=True); s.accept()"
    caller = "import socket; print(socket.create_connection(('10.78.0.2',7300)).getsockname()[0])"
    command = inside(topology.hosts["b"], [sys.executable, "-c", listener])
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert run(topology.hosts["a"], sys.executable, "-c", caller).strip() == "10.78.0.1"


def test_a_frame_crosses_from_either_host_s_bridge_to_the_client(topology: Topology) -> None:
    """An address on a host's bridge stands in for the guest, which has its gate there."""
    sender = "import socket; socket.socket(2,2).sendto(b'hello', ('10.77.0.1', 9000))"
    receiver = (
        "import socket; s=socket.socket(2,2); s.bind(('10.77.0.1',9000)); print(1,flush=True); "
        "print(s.recvfrom(99)[1][0])"
    )
    for side, address in (("a", "10.77.0.10"), ("b", "10.77.0.11")):
        before = topology.port_traffic(side)
        command = inside(topology.client, [sys.executable, "-c", receiver])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            server.stdout.readline()
            host = topology.hosts[side]
            run(host, "ip", "addr", "add", f"{address}/24", "dev", "br0")
            run(host, sys.executable, "-c", sender)
            run(host, "ip", "addr", "del", f"{address}/24", "dev", "br0")
            assert server.stdout.readline().strip() == address
        assert topology.port_traffic(side).received_frames > before.received_frames


def test_an_idle_network_is_silent_and_has_no_ipv6(topology: Topology) -> None:
    for namespace in (topology.client, topology.switch, *topology.hosts.values()):
        assert "inet6" not in run(namespace, "ip", "addr", "show")
    bridge = run(topology.switch, "ip", "-d", "link", "show", "br0")
    assert "stp_state 0" in bridge
    assert "forward_delay 0" in bridge


def test_everything_goes_with_the_run_also_after_an_error() -> None:
    children = []

    def fail_in_between(directory: RunDirectory) -> None:
        with directory, Topology(directory.name):
            assert len(namespaces_with(directory.name)) == 5
            sleeper = subprocess.Popen(["sleep", "600"], env=directory.environment, start_new_session=True)
            children.append(sleeper)
            raise RuntimeError("in between")

    directory = RunDirectory(keep=False)
    with pytest.raises(RuntimeError, match="in between"):
        fail_in_between(directory)
    assert namespaces_with(directory.name) == ()
    assert not directory.path.exists()
    assert children[0].wait() == -signal.SIGKILL


def test_kept_files_stay_and_are_never_swept() -> None:
    with RunDirectory(keep=True) as directory:
        (directory.path / "worker.log").write_text("why")
    assert directory.name not in sweep()
    assert (directory.path / "worker.log").read_text() == "why"
    (directory.path / "worker.log").unlink()
    directory.path.rmdir()


def test_what_goes_wrong_has_the_ends_of_all_logs() -> None:
    with RunDirectory(keep=False) as directory:
        (directory.path / "switch").mkdir()
        (directory.path / "log").mkdir()
        (directory.path / "switch" / "log").write_text("the switch's words\n")
        (directory.path / "worker.log").write_text("".join(f"line {number}\n" for number in range(100)))
        (directory.path / "empty.log").touch()
        with pytest.raises(TransientError) as caught, directory.logs_in_errors():
            raise TransientError("it did not work", operation="try")
        (note,) = caught.value.__notes__
    assert "--- switch/log\nthe switch's words" in note
    assert note.endswith("line 99")
    assert "line 50\n" not in note
    assert "empty" not in note


def test_the_next_run_sweeps_after_one_that_was_killed_and_leaves_the_living_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # or a run beside this one sweeps first
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = (
        "import subprocess, time\n"
        "from kagemusha.demo.rundir import RunDirectory\n"
        "from kagemusha.demo.topology import Topology\n"
        "with RunDirectory(keep=False) as directory, Topology(directory.name):\n"
        "    child = subprocess.Popen(['sleep', '600'], env=directory.environment, start_new_session=True,\n"
        "                             stdout=subprocess.DEVNULL)\n"
        "    print(directory.name, child.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with RunDirectory(keep=False) as living, Topology(living.name):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None
            name, child = victim.stdout.readline().split()
            victim.kill()
        assert [entry.pid for entry in marked(MARK, name)] == [int(child)]
        assert len(namespaces_with(name)) == 5
        assert name in sweep()
        assert namespaces_with(name) == ()
        assert marked(MARK, name) == ()
        assert len(namespaces_with(living.name)) == 5
        assert living.path.exists()
