"""The guest of demo and tests: Debian's cloud kernel, and busybox, redis, iperf3, SIPp in an initramfs.

Invariant: an image is named by what it is made of (package versions and our guest files), written aside and
moved into place whole; a folder that exists is complete and never changes. The servers are the
distribution's own.

What the guest does is in ``guest/``: ``boot`` (modules, network), ``ready`` (the READY line), ``inittab``,
``pattern.c`` (the witness of its memory). A shell listens on COMMAND_PORT for tests, so this is no guest
for an open network. Does not start QEMU.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import lzma
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

from kagemusha.demo import initramfs
from kagemusha.demo.debian import LOADER, PackageTree, Progress, candidates, newest_dependency, run, update
from kagemusha.errors import KageError, TransientError, UnsupportedError

COMMAND_PORT = 2323
REDIS_PORT = 6379
WITNESS_PORT = 2324
"""Where ``pattern`` is asked, by TCP or UDP, if it was started with a port; nothing of the image starts it so."""

# Raised when the way an image is put together changes without a change of its parts.
RECIPE = 1
KERNEL_PACKAGE = "linux-image-cloud-amd64"
PROGRAM_PACKAGES = ("busybox-static", "iperf3", "redis-server", "redis-tools", "sip-tester")
PROGRAMS = ("redis-server", "redis-cli", "redis-benchmark", "iperf3", "sipp")
MODULES = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_console", "virtio_balloon")
C_PROGRAMS = ("pattern", "seed")
CALLS_FILE = PurePosixPath("/etc/kage/answer.xml")
"""In the guest: SIPp's scenario to answer calls with."""


@dataclass(frozen=True, slots=True)
class GuestImage:
    """A bootable pair for ``-kernel`` and ``-initrd``; ``packages`` maps package names to versions."""

    kernel: Path
    initrd: Path
    packages: dict[str, str]


def default_cache_dir() -> Path:
    """Return where images are kept unless told otherwise."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "kagemusha"
    return Path("/var/cache/kagemusha") if os.geteuid() == 0 else Path.home() / ".cache" / "kagemusha"


def build_image(cache_dir: Path | None = None, progress: Progress = lambda message: None) -> GuestImage:
    """Return the guest image, built from the distribution's packages unless this version of it is cached.

    :param progress: called with a short message before each step that takes time.
    :raises UnsupportedError: the host is no Debian, or lacks a tool.
    :raises TransientError: a download or tool failed.
    """
    cache = cache_dir or default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with _only_builder(cache):
        try:
            folder = _newest_image(cache, progress)
        except TransientError:
            # Lists older than the archive name files that are gone from it.
            update(progress)
            folder = _newest_image(cache, progress)
    packages: dict[str, str] = json.loads((folder / "packages.json").read_text())
    return GuestImage(folder / "vmlinuz", folder / "initrd", packages)


def _newest_image(cache: Path, progress: Progress) -> Path:
    files = _guest_files()
    ours = _digest(RECIPE, MODULES, PROGRAMS, sorted(files.items()))
    try:
        versions = _wanted_versions(progress)
    except KageError:
        # Without apt's lists the versions are unknown; any image with our files is better than none.
        if not (images := list(cache.glob(f"image-{ours}-*"))):
            raise
        return max(images, key=lambda folder: folder.stat().st_mtime)
    folder = cache / f"image-{ours}-{_digest(sorted(versions.items()))}"
    if not folder.exists():
        _build(folder, versions, files, progress)
    return folder


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _guest_files() -> dict[str, bytes]:
    folder = resources.files("kagemusha.demo") / "guest"
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}


def _wanted_versions(progress: Progress) -> dict[str, str]:
    """Return the kernel package and the programs' packages with their versions."""
    wanted = (KERNEL_PACKAGE, *PROGRAM_PACKAGES)
    versions = candidates(wanted)
    if len(versions) < len(wanted):
        update(progress)
        versions = candidates(wanted)
    if missing := set(wanted) - versions.keys():
        raise UnsupportedError(f"apt has no package {', '.join(sorted(missing))}", hint="Debian 12 or 13 is needed")
    del versions[KERNEL_PACKAGE]
    kernel = newest_dependency(KERNEL_PACKAGE, r"linux-image-[\w.+-]+-cloud-amd64")
    return {**candidates([kernel]), **versions}


def _build(folder: Path, versions: dict[str, str], files: dict[str, bytes], progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="build-") as temporary:
        scratch = Path(temporary)
        tree = PackageTree(scratch / "tree", folder.parent / "packages", progress)
        tree.add(versions)
        progress("assembling the guest image")
        made = scratch / "image"
        made.mkdir()
        kernel = next(tree.root.glob("linux-image-*/boot/vmlinuz-*"))
        (made / "vmlinuz").write_bytes(kernel.read_bytes())
        (made / "initrd").write_bytes(initramfs.lz4_legacy(initramfs.cpio(_entries(tree, files, scratch))))
        (made / "packages.json").write_text(json.dumps(tree.packages, indent=1, sort_keys=True))
        made.rename(folder)


def _entries(tree: PackageTree, files: dict[str, bytes], scratch: Path) -> dict[str, initramfs.Entry]:
    entries = {
        "init": initramfs.symlink("/bin/busybox"),
        "bin/busybox": initramfs.file(tree.program("busybox").path.read_bytes(), executable=True),
        "dev/console": initramfs.character_device(5, 1),
        "etc/inittab": initramfs.file(files["inittab"]),
        "etc/passwd": initramfs.file(b"root:x:0:0:root:/:/bin/sh\n"),
    }
    for name in ("boot", "ready", "redis.conf", CALLS_FILE.name):
        entries[f"etc/kage/{name}"] = initramfs.file(files[name], executable=True)
    for folder in ("proc", "sys", "tmp", "var/log", "var/run"):
        entries[folder] = initramfs.folder()
    programs = {name: tree.program(name) for name in PROGRAMS}
    for name, found in programs.items():
        entries[f"bin/{name}"] = initramfs.file(found.path.read_bytes(), executable=True)
    for name, path in tree.libraries(programs.values()).items():
        where = "lib64" if name == LOADER else "lib/x86_64-linux-gnu"
        entries[f"{where}/{name}"] = initramfs.file(path.read_bytes(), executable=True)
    for name in C_PROGRAMS:
        program = _compiled(files[f"{name}.c"], scratch / name)
        entries[f"bin/{name}"] = initramfs.file(program, executable=True)
    modules = _modules(tree)
    for name, content in modules.items():
        entries[f"lib/modules/{name}.ko"] = initramfs.file(content)
    entries["etc/kage/modules"] = initramfs.file("\n".join(modules).encode() + b"\n")
    return entries


def _compiled(source: bytes, target: Path) -> bytes:
    target.with_suffix(".c").write_bytes(source)
    run("gcc", "-O2", "-static", "-s", "-o", str(target), str(target.with_suffix(".c")))
    return target.read_bytes()


def _modules(tree: PackageTree) -> dict[str, bytes]:
    """Return the content of MODULES and of what they depend on, each after its dependencies.

    Packages have no modules.dep (it is made on installation): each module names its dependencies in its own
    ``.modinfo`` section. What is built into the kernel needs no file.

    :raises UnsupportedError: the kernel has a module neither as a file nor built in.
    """

    def module_name(path: str) -> str:
        return path.rsplit("/", 1)[-1].split(".ko")[0].replace("-", "_")

    available = {module_name(path.name): path for path in tree.root.rglob("*.ko*")}
    lists = tree.root.rglob("modules.builtin")
    built_in = {module_name(line) for path in lists for line in path.read_text().splitlines()}
    ordered: dict[str, bytes] = {}

    def visit(name: str) -> None:
        if name in ordered or name in built_in:
            return
        if name not in available:
            raise UnsupportedError(f"the cloud kernel has no module {name}")
        content = available[name].read_bytes()
        if available[name].suffix == ".xz":
            content = lzma.decompress(content)
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for dependency in depends[1].decode().split(",") if depends and depends[1] else ():
            visit(module_name(dependency))
        ordered[name] = content

    for name in MODULES:
        visit(name)
    return ordered


if __name__ == "__main__":
    print(build_image(progress=print).kernel.parent)
