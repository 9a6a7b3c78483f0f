"""``[arbiter]`` and ``node``: what is taken, and that what is not taken is refused by its key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kagemusha.errors import ConfigError
from kagemusha.failover.arbiters import make_arbiter
from kagemusha.failover.etcd_arbiter import EtcdArbiter
from kagemusha.failover.file_arbiter import FileArbiter
from kagemusha.failover.switch_arbiter import SwitchArbiter
from kagemusha.model.config import ArbiterTable, Config, load

BASE = """
vm = { name = "vm1", command = ["qemu-system-x86_64"] }
network = { uplink = "eth0" }
tls = { insecure = true }
primary = { standby = "192.0.2.2:7000" }
"""
ETCD = 'kind = "etcd"\nendpoints = ["https://192.0.2.1:2379"]'


def read(folder: Path, arbiter: str = "", plain: str = "") -> Config:
    path = folder / "kage.toml"
    path.write_text(f"{plain}\n{BASE}\n[arbiter]\n{arbiter}\n")
    return load(path, role="primary")


def test_none_is_the_default(tmp_path: Path) -> None:
    table = read(tmp_path).arbiter
    assert (table.kind, table.timeout_ms) == ("none", 500)
    assert make_arbiter(table) is None


def test_each_kind_is_made(tmp_path: Path) -> None:
    of_file = read(tmp_path, f'kind = "file"\ndirectory = "{tmp_path}/terms"').arbiter
    assert isinstance(make_arbiter(of_file), FileArbiter)
    assert (tmp_path / "terms").is_dir()
    of_switch = read(tmp_path, 'kind = "switch"\n[switch]\naddress = "192.0.2.3:7200"')
    assert of_switch.switch is not None
    assert (of_switch.switch.port, of_switch.switch.seal_ms) == (None, 50)
    made = make_arbiter(of_switch.arbiter, switch=of_switch.switch, tls=of_switch.tls, node="a")
    assert isinstance(made, SwitchArbiter)
    of_etcd = read(tmp_path, 'kind = "etcd"\nendpoints = ["http://192.0.2.1:2379/", "http://[::1]:2379"]').arbiter
    assert of_etcd.endpoints == ("http://192.0.2.1:2379", "http://[::1]:2379")
    assert isinstance(make_arbiter(of_etcd), EtcdArbiter)


@pytest.mark.parametrize(
    ("arbiter", "said"),
    [
        ('kind = "zookeeper"', "arbiter.kind"),
        ('kind = "file"', "'directory' is missing"),
        ('kind = "etcd"', "'endpoints' is missing"),
        ('kind = "switch"', "[switch] is missing: arbiter.kind = 'switch'"),
        ('kind = "switch"\ndirectory = "/d"\n[switch]\naddress = "a:1"', "'directory' is not for kind = 'switch'"),
        ('kind = "etcd"\nendpoints = []', "'endpoints' is missing"),
        ('kind = "file"\ndirectory = "/d"\nendpoints = ["http://a:1"]', "'endpoints' is not for kind = 'file'"),
        ('directory = "/d"', "'directory' is not for kind = 'none'"),
        ('kind = "etcd"\nendpoints = ["192.0.2.1:2379"]', "arbiter.endpoints: '192.0.2.1:2379' is not a URL"),
        ('kind = "etcd"\nendpoints = ["http://a:2379/v3"]', "arbiter.endpoints"),
        ('kind = "etcd"\nendpoints = ["http://user:secret@a:2379"]', "arbiter.endpoints"),
        ('kind = "etcd"\nendpoints = ["http://a:0"]', "arbiter.endpoints"),
        ('kind = "etcd"\nendpoints = ["http://a:65536"]', "arbiter.endpoints"),
        ('kind = "etcd"\nendpoints = ["http://a:1", "http://a:1/"]', "'http://a:1' is there twice"),
        (f'{ETCD}\nuser = ""', "arbiter.user"),
        (f'{ETCD}\nuser = "kage"', "'user' and 'password_file' belong together"),
        (f'{ETCD}\npassword_file = "/p"', "'user' and 'password_file' belong together"),
        (f'{ETCD}\ncert = "/c"', "'cert' and 'key' belong together"),
        (f'{ETCD}\nkey = "/k"', "'cert' and 'key' belong together"),
        ('kind = "etcd"\nendpoints = ["http://a:1"]\nca = "/c"', "https://"),
        ('kind = "etcd"\nendpoints = ["https://a:1", "http://b:1"]\ncert = "/c"\nkey = "/k"', "https://"),
        ('kind = "file"\ndirectory = "/d"\nca = "/c"', "'ca' is only for kind = 'etcd'"),
        ('kind = "file"\ndirectory = "/d"\nuser = "u"\npassword_file = "/p"', "'user' is only for kind = 'etcd'"),
        (f"{ETCD}\ntimeout_ms = 49", "arbiter.timeout_ms"),
        (f"{ETCD}\ntimeout_ms = 60001", "arbiter.timeout_ms"),
        (f'{ETCD}\npassword = "secret"', "arbiter.password"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arbiter: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, arbiter)
    assert said in caught.value.message
    assert "arbiter" in caught.value.message


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('user = "kage"\npassword_file = "{0}/nothing"', r"arbiter\.password_file .*/nothing"),
        ('user = "kage"\npassword_file = "{0}/binary"', r"arbiter\.password_file .*/binary"),
        ('ca = "{0}/nothing"', r"arbiter\.ca .*/nothing"),
        ('ca = "{0}/binary"', r"arbiter\.ca .*/binary"),
        ('cert = "{0}/nothing"\nkey = "{0}/binary"', r"arbiter\.cert .*/nothing"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, more: str, said: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    table = read(tmp_path, f"{ETCD}\n{more.format(tmp_path)}").arbiter
    with pytest.raises(ConfigError, match=said):
        make_arbiter(table)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"arbiter\.directory"):
            make_arbiter(ArbiterTable(kind="file", directory=path))


def test_the_node_is_called_as_said_or_as_the_host(tmp_path: Path) -> None:
    assert read(tmp_path, plain='node = "host-a.example"').node_name == "host-a.example"
    assert read(tmp_path).node_name == os.uname().nodename


@pytest.mark.parametrize("name", ["", "two words", "-a", "a/b", "x" * 64, "ä"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="node"):
        read(tmp_path, plain=f'node = "{name}"')


LOAD = """
import socket, sys
from pathlib import Path
from kagemusha.errors import ConfigError
from kagemusha.model.config import load
socket.sethostname(sys.argv[1])
try:
    print("loaded", load(Path(sys.argv[2]), role="primary").node_name)
except ConfigError as error:
    print(error)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: names a host")
def test_a_host_with_a_name_that_is_none_has_to_be_given_one(tmp_path: Path) -> None:
    """The kernel's own default is one."""

    def on_host(name: str) -> str:
        program = ["unshare", "--uts", sys.executable, "-c", LOAD, name, str(tmp_path / "kage.toml")]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout

    read(tmp_path)
    assert on_host("host-a") == "loaded host-a\n"
    assert "node: this host is called '(none)'" in on_host("(none)")
    read(tmp_path, plain='node = "a"')
    assert on_host("(none)") == "loaded a\n"
