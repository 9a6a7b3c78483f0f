"""Real connections for tests: listeners on free ports, links over TCP and TLS, certificates on disk."""

from __future__ import annotations

import select
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trustme
from tests.harness.conditions import PATIENCE_S
from tests.harness.wire import TERM

from kagemusha.errors import PeerError, TransientError
from kagemusha.model.config import Address, TlsTable
from kagemusha.model.ids import FIRST_EPOCH, Epoch
from kagemusha.transport import tls
from kagemusha.transport.link import Inbox, Link, accept, connect
from kagemusha.wire.frame import Frame, FrameHeader, FrameType, make_frame

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Certificates:
    """One authority's files for both sides; the standby's certificate is for ``HOST``."""

    server: TlsTable
    client: TlsTable


def make_certificates(folder: Path, *, host: str = HOST) -> Certificates:
    """Write an authority and a certificate for each side."""
    folder.mkdir(parents=True)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    tables = []
    for name, identity in (("standby", host), ("primary", "primary.example")):
        certificate = authority.issue_cert(identity)
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        tables.append(
            TlsTable(cert=folder / f"{name}.pem", key=folder / f"{name}.key", ca=folder / "ca.pem", insecure=False)
        )
    return Certificates(*tables)


def listener_on_free_port() -> tuple[socket.socket, Address]:
    """A listening socket and where it listens."""
    listener = socket.create_server((HOST, 0))
    listener.setblocking(False)
    return listener, Address(host=HOST, port=listener.getsockname()[1])


def ignore(_header: FrameHeader, _payload: memoryview) -> None:
    """An inbox for a test in which nothing comes."""


@dataclass
class Ends:
    """Both ends of one connection."""

    primary: Link
    standby: Link

    def close(self) -> None:
        self.primary.close()
        self.standby.close()


def join(server: ssl.SSLContext | None = None, client: ssl.SSLContext | None = None, *, inbox: Inbox = ignore) -> Ends:
    """Connect two links. A TLS handshake needs both ends at once, so one of them is made in a thread.

    :raise KageError: what the primary's end met; the standby's end is closed then.
    """
    listener, address = listener_on_free_port()
    with listener, ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, address, client, inbox=inbox)
        assert select.select([listener], [], [], PATIENCE_S)[0]
        standby, _ = accept(listener, server)
        try:
            with suppress(PeerError, TransientError):  # the primary's end tells what was wrong
                while not connecting.done():
                    assert standby.receive() is None
                    select.select([standby], [], [], 0.001)
            return Ends(connecting.result(), standby)
        except BaseException:
            standby.close()
            raise


def contexts(certificates: Certificates) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Server's and client's context, through the product's own code."""
    server, client = tls.context(certificates.server, "server"), tls.context(certificates.client, "client")
    assert server is not None
    assert client is not None
    return server, client


def next_frame(link: Link) -> tuple[FrameHeader, memoryview]:
    """Wait for one frame."""
    while (received := link.receive()) is None:
        assert select.select([link], [], [], PATIENCE_S)[0], "no frame came"
    return received


def until_error(link: Link) -> None:
    """Receive until something is raised."""
    while True:
        next_frame(link)


def device_frame(size: int, *, fill: int = 0x5A, epoch: Epoch = FIRST_EPOCH, payload: bytes | None = None) -> Frame:
    """A frame with a payload that no codec looks at."""
    parts = (bytes([fill]) * size if payload is None else payload,)
    return make_frame(FrameType.DEVICE_STATE, term=TERM, epoch=epoch, parts=parts)
