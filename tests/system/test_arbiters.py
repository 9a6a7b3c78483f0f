"""Each term has one holder, whatever the arbiter is; the folder of one machine; and the process that asks."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from tests.harness.claims import VM, SwitchClaims, etcd_table, next_answer, opened
from tests.harness.commands import wait
from tests.harness.conditions import PATIENCE_S
from tests.harness.etcd import Etcd, User, enable_users, make_etcd
from tests.harness.switch_side import running_switch

from kagemusha.demo.processes import descendants
from kagemusha.errors import ConfigError, TransientError
from kagemusha.failover.arbiter import Arbiter, Claimed
from kagemusha.failover.claimant import Claimant, ClaimStatistics, Lost, Unanswered, Won
from kagemusha.failover.etcd_arbiter import PREFIX
from kagemusha.model.config import ArbiterTable
from kagemusha.model.ids import Term

ROUNDS = 40
CLAIMANTS = 4
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    etcd = make_etcd(tmp_path_factory.mktemp("etcd"), 1)
    with closing(etcd):
        etcd.start()
        yield etcd


@pytest.fixture(params=["file", "etcd", "switch"])
def any_table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ArbiterTable | SwitchClaims]:
    if request.param == "switch":
        with running_switch(tmp_path / "switch") as switch:
            yield SwitchClaims(switch.address)
    else:
        etcd = request.param == "etcd"
        yield etcd_table(request.getfixturevalue("single")) if etcd else file_table(tmp_path / "arbiter")


def file_table(folder: Path) -> ArbiterTable:
    return ArbiterTable(kind="file", directory=folder)


# --- every arbiter ----------------------------------------------------------------------------------------------------


def test_the_first_claim_wins_and_is_told_so_again(any_table: ArbiterTable | SwitchClaims) -> None:
    vm = f"first-{any_table.kind}"
    with closing(opened(any_table)) as arbiter:
        assert arbiter.newest(vm) is None
        assert arbiter.claim(vm, Term(7), "a/1") == Claimed(Term(7), "a/1")
        assert arbiter.claim(vm, Term(7), "b/1") == Claimed(Term(7), "a/1")
        assert arbiter.claim(vm, Term(7), "a/1") == Claimed(Term(7), "a/1")
        assert arbiter.claim(vm, Term(10), "b/1").node == "b"
        assert arbiter.claim(vm, Term(9), "c/1") == Claimed(Term(9), "c/1")
        assert arbiter.newest(vm) == Claimed(Term(10), "b/1")


def test_terms_of_vms_with_similar_names_are_apart(any_table: ArbiterTable | SwitchClaims) -> None:
    names = ("web", "we", "web-1", "web.term-0000000001", "web.term", "web0")
    with closing(opened(any_table)) as arbiter:
        for term, name in enumerate(names, 1):
            assert arbiter.newest(name) is None
            assert arbiter.claim(name, Term(term), "a/1").holder == "a/1"
        assert [arbiter.newest(name) for name in names] == [Claimed(Term(i), "a/1") for i in range(1, len(names) + 1)]


def test_a_name_that_cannot_be_stored_is_refused(any_table: ArbiterTable | SwitchClaims) -> None:
    vm = f"names-{any_table.kind}"
    with closing(opened(any_table)) as arbiter:
        for name in ("", "two words", "two\nlines", "ä", "x" * 201):
            with pytest.raises(ConfigError, match="no name of a claimant"):
                arbiter.claim(vm, Term(1), name)
        assert arbiter.newest(vm) is None
        assert arbiter.claim(vm, Term(1), "x" * 200).holder == "x" * 200


def race(
    of: ArbiterTable | SwitchClaims,
    name: str,
    together: Barrier,
    results: multiprocessing.SimpleQueue[tuple[int, str, str]],
) -> None:
    arbiter = opened(of)
    for term in range(1, ROUNDS + 1):
        together.wait()
        while True:
            with suppress(TransientError):
                results.put((term, name, arbiter.claim("race", Term(term), name).holder))
                break
    arbiter.close()


def test_of_many_processes_one_wins_each_term(any_table: ArbiterTable | SwitchClaims) -> None:
    spawn = multiprocessing.get_context("spawn")
    results, together = spawn.SimpleQueue(), spawn.Barrier(CLAIMANTS)
    names = [f"n{index}/1" for index in range(CLAIMANTS)]
    processes = [spawn.Process(target=race, args=(any_table, name, together, results)) for name in names]
    for process in processes:
        process.start()
    told = [results.get() for _ in range(ROUNDS * CLAIMANTS)]
    for process in processes:
        process.join()
    for term in range(1, ROUNDS + 1):
        holders = {holder for number, _, holder in told if number == term}
        assert len(holders) == 1, f"term {term}"
    assert len({holder for _, _, holder in told}) > 1, "all claimed one after the other: this was no race"


# --- the switch -------------------------------------------------------------------------------------------------------


def test_a_restarted_switch_gives_no_term_twice(tmp_path: Path) -> None:
    """The arbiter's connection is dead then, and is made again with the next question."""
    with running_switch(tmp_path) as switch, closing(opened(SwitchClaims(switch.address))) as arbiter:
        assert arbiter.claim(VM, Term(3), "a/1").holder == "a/1"
        switch.stop()
        with pytest.raises(TransientError):
            arbiter.claim(VM, Term(4), "a/1")
        switch.start()
        assert arbiter.newest(VM) == Claimed(Term(3), "a/1")
        assert arbiter.claim(VM, Term(3), "b/1").holder == "a/1"
        assert arbiter.claim(VM, Term(4), "b/1").holder == "b/1"


def test_a_term_that_nobody_can_have_is_refused_by_the_switch(tmp_path: Path) -> None:
    with running_switch(tmp_path) as switch, closing(opened(SwitchClaims(switch.address))) as arbiter:
        with pytest.raises(ConfigError, match="too far from term 0"):
            arbiter.claim(VM, Term(1 << 31), "a/1")
        assert arbiter.newest(VM) is None
        assert switch.refused("forged") == 1


def test_a_claimant_asks_a_switch_until_it_is_there(tmp_path: Path) -> None:
    with running_switch(tmp_path) as switch:
        switch.stop()
        with closing(Claimant(partial(opened, SwitchClaims(switch.address)), VM, "a/1")) as claimant:
            claimant.claim(Term(2))
            next_answer(claimant, Unanswered)
            switch.start()
            assert next_answer(claimant, Won) == Won(Term(2))


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\xff\0 \n", b"a/1", b"two words\n", b"x" * 300 + b"\n"])
def test_a_claim_that_is_none_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{VM}.term-0000000003").write_bytes(content)
    arbiter = opened(file_table(tmp_path))
    with pytest.raises(ConfigError, match=f"{VM}.term-0000000003 is no claim of ours"):
        arbiter.claim(VM, Term(3), "a/1")
    with pytest.raises(ConfigError, match="is no claim of ours"):
        arbiter.newest(VM)
    assert arbiter.claim("another", Term(3), "a/1").holder == "a/1"


def test_other_things_in_the_folder(tmp_path: Path) -> None:
    arbiter = opened(file_table(tmp_path))
    (tmp_path / ".0011223344556677").write_bytes(b"b/")  # a claim that was cut off by SIGKILL
    (tmp_path / "README").write_text("not a claim")
    assert arbiter.newest(VM) is None
    assert arbiter.claim(VM, Term(1), "a/1").holder == "a/1"
    (tmp_path / f"{VM}.term-0000000002").mkdir()
    (tmp_path / f"{VM}.term-0000000003").symlink_to("nowhere")
    for term in (Term(2), Term(3)):
        with pytest.raises(ConfigError, match="is no claim of ours"):
            arbiter.claim(VM, term, "a/1")
    (tmp_path / f"{VM}.term-4").write_text("a/1\n")
    with pytest.raises(ConfigError, match=r"term-4 is no claim of ours"):
        arbiter.newest(VM)


def test_the_folder_is_gone_and_comes_back(tmp_path: Path) -> None:
    arbiter = opened(file_table(tmp_path / "arbiter"))
    (tmp_path / "arbiter").rename(tmp_path / "aside")
    with pytest.raises(TransientError, match="claim term 1"):
        arbiter.claim(VM, Term(1), "a/1")
    with pytest.raises(TransientError, match="newest"):
        arbiter.newest(VM)
    (tmp_path / "aside").rename(tmp_path / "arbiter")
    assert arbiter.claim(VM, Term(1), "a/1").holder == "a/1"


@pytest.mark.root
@needs_root
def test_a_full_file_system(tmp_path: Path) -> None:
    """Nothing is given away that cannot be written, and no try leaves anything behind."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "kage-test", str(folder)], check=True)
    try:
        arbiter = opened(file_table(folder))
        with suppress(OSError), open(folder / "filler", "ab", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        for _ in range(20):
            with pytest.raises(TransientError, match="No space left"):
                arbiter.claim(VM, Term(1), "a/1")
        assert os.listdir(folder) == ["filler"]
        assert arbiter.newest(VM) is None
        (folder / "filler").unlink()
        assert arbiter.claim(VM, Term(1), "b/1").holder == "b/1"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- the process that asks --------------------------------------------------------------------------------------------


def claims_process(claimant: Claimant) -> int:
    """The only one that the test has started; it has its name a moment after it was forked."""
    assert claimant.fileno() >= 0

    def found() -> list[int]:
        return [entry.pid for entry in descendants(os.getpid()) if entry.name == "kage-claims"]

    wait(lambda: len(found()) == 1, "the process has its name")
    return found()[0]


def test_a_claimant_asks_until_it_is_answered(tmp_path: Path) -> None:
    etcd = make_etcd(tmp_path / "late", 1)
    of = etcd_table(etcd)
    ours, theirs = (Claimant(partial(opened, of), VM, name) for name in ("a/1", "b/1"))
    with closing(etcd), closing(ours), closing(theirs):
        ours.claim(Term(2))
        for _ in range(3):
            answer = next_answer(ours, Unanswered)
            assert answer.term == 2
            assert etcd.endpoints[0] in answer.reason
        assert ours.statistics().open_term == 2
        etcd.start()
        assert next_answer(ours, Won) == Won(Term(2))
        theirs.claim(Term(2))
        assert next_answer(theirs, Lost) == Lost(Term(2), "a/1")
        assert theirs.statistics() == ClaimStatistics(1, 0, 0, 1, 0, None)
        theirs.note(Term(2))
        assert next_answer(theirs, Lost) == Lost(Term(2), "a/1")
        ours.note(Term(3))
        with closing(opened(of)) as arbiter:
            wait(lambda: knows(arbiter, Claimed(Term(3), "a/1")), "the term is noted")
        assert ours.take() is None
        assert ours.statistics().won == 1


def test_a_note_does_not_push_a_claim_aside(tmp_path: Path) -> None:
    in_its_way = tmp_path / f"{VM}.term-0000000005"
    in_its_way.mkdir()
    with closing(Claimant(partial(opened, file_table(tmp_path)), VM, "a/1")) as claimant:
        claimant.claim(Term(5))
        assert next_answer(claimant, Unanswered).term == 5
        claimant.note(Term(4))
        in_its_way.rmdir()
        assert next_answer(claimant, Won) == Won(Term(5))
        assert claimant.statistics().notes == 0


def test_a_claim_that_was_dropped_is_not_answered(tmp_path: Path) -> None:
    """Not either when its answer was there already."""
    with closing(Claimant(partial(opened, file_table(tmp_path)), VM, "a/1")) as claimant:
        for term in (2, 4, 6):
            claimant.claim(Term(term))
            assert select.select([claimant], [], [], PATIENCE_S)[0]
            claimant.drop()
            assert claimant.take() is None
            claimant.claim(Term(term + 1))
            assert next_answer(claimant, Won) == Won(Term(term + 1))
        assert claimant.statistics().won == 3


def test_what_an_operator_puts_right_is_used(tmp_path: Path) -> None:
    """An arbiter that refuses us is asked again, with the files read anew."""
    password = tmp_path / "password"
    with closing(make_etcd(tmp_path / "auth", 1)) as etcd:
        etcd.start()
        enable_users(etcd, User("kage", "right", PREFIX))
        table = etcd_table(etcd, user="kage", password_file=password)
        with closing(Claimant(partial(opened, table), VM, "a/1")) as claimant:
            claimant.claim(Term(1))
            assert "arbiter.password_file" in next_answer(claimant, Unanswered).reason
            password.write_text("wrong\n")
            wait(lambda: "refuses us" in next_answer(claimant, Unanswered).reason, "etcd says no")
            password.write_text("right\n")
            assert next_answer(claimant, Won) == Won(Term(1))


def test_the_worker_does_not_wait_for_a_process_that_stands_still(tmp_path: Path) -> None:
    with closing(Claimant(partial(opened, file_table(tmp_path)), VM, "a/1")) as claimant:
        pid = claims_process(claimant)
        os.kill(pid, signal.SIGSTOP)
        for term in range(1, 5001):  # far more than its pipe can hold
            claimant.claim(Term(term))
            claimant.drop()
            assert claimant.take() is None
        claimant.claim(Term(6000))
        os.kill(pid, signal.SIGCONT)
        assert next_answer(claimant, Won) == Won(Term(6000))


def test_it_ends_with_its_worker_and_in_the_middle_of_asking(single: Etcd) -> None:
    (member,) = single.members
    claimant = Claimant(partial(opened, etcd_table(single, timeout_ms=60_000)), "frozen", "a/1")
    pid = claims_process(claimant)
    with member.frozen():
        claimant.claim(Term(1))
        wait(lambda: _connections(pid) > 0, "it asks")
        claimant.close()  # far sooner than its time limit: the test's own would strike
        claimant.close()
        assert not Path(f"/proc/{pid}").exists()


def test_one_that_dies_is_started_again_with_the_open_claim(tmp_path: Path) -> None:
    etcd = make_etcd(tmp_path / "late", 1)
    with closing(Claimant(partial(opened, etcd_table(etcd)), VM, "a/1")) as claimant, closing(etcd):
        descriptor = claimant.fileno()
        claimant.claim(Term(2))
        next_answer(claimant, Unanswered)
        os.kill(claims_process(claimant), signal.SIGKILL)
        etcd.start()
        assert next_answer(claimant, Won) == Won(Term(2))
        assert claimant.fileno() == descriptor


def knows(arbiter: Arbiter, newest: Claimed) -> bool:
    """Whether it says so; a late answer is none."""
    with suppress(TransientError):
        return arbiter.newest(VM) == newest
    return False


def _connections(pid: int) -> int:
    """TCP connections of the process."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was seen
            links.append(os.readlink(entry))
    ours = {link[len("socket:[") : -1] for link in links if link.startswith("socket:")}
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[9] in ours for line in lines)
