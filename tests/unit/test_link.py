"""Links over real TCP and TLS connections: what crosses them whole, and what every way of breaking looks like."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.harness.conditions import PATIENCE_S
from tests.harness.links import (
    Certificates,
    Ends,
    contexts,
    device_frame,
    ignore,
    join,
    listener_on_free_port,
    make_certificates,
    next_frame,
    until_error,
)
from tests.harness.wire import TERM

from kagemusha.errors import ConfigError, KageError, PeerError, TransientError, WireError
from kagemusha.model.config import Address, TlsTable
from kagemusha.model.ids import Epoch
from kagemusha.transport import tls
from kagemusha.transport.link import Link, accept, connect, listen
from kagemusha.wire.frame import FrameHeader, FrameType, pack_frame
from kagemusha.wire.handshake import Goodbye
from kagemusha.wire.messages import Heartbeat, decode, encode

BIG = 1 << 20
CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + bytes(194)
STRANGERS = {
    "http": b"GET / HTTP/1.1\r\nHost: standby\r\n\r\n",
    "ssh": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "tls": CLIENT_HELLO,
    "nothing like it": bytes(range(256)),
    "one byte": b"\0",
}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(params=["tcp", "tls"])
def ends(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Ends]:
    joined = join() if request.param == "tcp" else join(*contexts(certificates))
    yield joined
    joined.close()


def raw_pair() -> tuple[socket.socket, Link]:
    """A bare client and the link of the side that accepted it."""
    listener, address = listener_on_free_port()
    with listener:
        client = socket.create_connection((address.host, address.port))
        assert select.select([listener], [], [], PATIENCE_S)[0]
        link, _ = accept(listener, None)
    return client, link


def test_frames_cross_in_both_directions(ends: Ends) -> None:
    for counter in range(1, 20):
        ends.primary.send(encode(Heartbeat(counter, 0), term=TERM))
        ends.standby.send(encode(Heartbeat(0, counter), term=TERM))
        assert decode(*next_frame(ends.standby)) == Heartbeat(counter, 0)
        assert decode(*next_frame(ends.primary)) == Heartbeat(0, counter)
    assert ends.primary.sent_bytes == ends.standby.received_bytes == 19 * 64
    assert ends.standby.sent_bytes == ends.primary.received_bytes == 19 * 64


def test_nothing_to_read_is_none(ends: Ends) -> None:
    assert ends.primary.receive() is None
    assert ends.standby.receive() is None


@pytest.mark.parametrize("size", [0, 1, 64 << 10, (64 << 10) + 1, BIG])
def test_payloads_of_every_size_arrive_as_they_were_sent(ends: Ends, size: int) -> None:
    payload = os.urandom(size)
    frame = device_frame(0, payload=payload)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(ends.primary.send, frame)
        header, received = next_frame(ends.standby)
        sending.result()
    assert (header.kind, header.length) == (FrameType.DEVICE_STATE, size)
    assert received == payload


def test_a_sender_waits_while_the_peer_does_not_read(ends: Ends) -> None:
    """More than any socket buffer: what could not be sent yet is not lost and not reordered."""
    frames = 24
    with ThreadPoolExecutor(1) as pool:

        def send_all() -> None:
            for index in range(frames):
                ends.primary.send(device_frame(BIG, fill=index))

        sending = pool.submit(send_all)
        assert not sending.done()
        for index in range(frames):
            _, payload = next_frame(ends.standby)
            assert payload == bytes([index]) * BIG
        sending.result(PATIENCE_S)


@pytest.mark.parametrize("secure", [False, True])
def test_both_ends_sending_at_once_do_not_wait_for_each_other(secure: bool, certificates: Certificates) -> None:
    """Neither end calls receive; only the inbox of the primary reads, while it sends."""
    frames = 16
    inbox: list[int] = []

    def take(header: FrameHeader, _payload: memoryview) -> None:
        inbox.append(header.length)

    ends = join(*contexts(certificates), inbox=take) if secure else join(inbox=take)
    standby_done = threading.Event()

    def standby() -> None:
        for _ in range(frames):
            ends.standby.send(device_frame(BIG))
        standby_done.set()
        for _ in range(frames):
            next_frame(ends.standby)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(standby)
        for _ in range(frames):
            ends.primary.send(device_frame(BIG))
        while len(inbox) < frames:
            take(*next_frame(ends.primary))
        running.result(PATIENCE_S)
    assert standby_done.is_set()
    assert inbox == [BIG] * frames
    ends.close()


@pytest.mark.parametrize("sent_bytes", [1, 4, 47, 48, 49, 1000])
def test_an_end_inside_a_frame_is_truncation(sent_bytes: int) -> None:
    client, link = raw_pair()
    frame = device_frame(2000)
    client.sendall((pack_frame(frame, sequence=0) + b"".join(frame.parts))[:sent_bytes])
    client.close()
    with pytest.raises(WireError, match="truncated"):
        until_error(link)
    assert link.ended, "whatever it cut off: a peer that died looks like this"
    link.close()


def test_an_end_between_frames_is_the_peers_farewell(ends: Ends) -> None:
    ends.primary.send(encode(Heartbeat(1, 0), term=TERM))
    ends.primary.close()
    next_frame(ends.standby)
    with pytest.raises(PeerError, match="closed the connection") as caught:
        until_error(ends.standby)
    assert not isinstance(caught.value, WireError)
    assert ends.standby.ended


def test_a_reset_may_go_away_by_itself() -> None:
    client, link = raw_pair()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(TransientError, match="connection broken"):
        until_error(link)
    assert link.ended
    link.close()


def test_the_last_word_of_a_peer_is_heard_though_sending_fails() -> None:
    """The standby says goodbye and is gone while we send: its promise must not be lost with the connection."""
    said: list[object] = []
    ends = join(inbox=lambda header, payload: said.append(decode(header, payload)))
    ends.primary.send(encode(Heartbeat(1, 0), term=TERM))
    assert select.select([ends.standby], [], [], PATIENCE_S)[0]
    ends.standby.send(encode(Goodbye(reason="the operator stops me"), term=TERM))
    ends.standby.close()  # with a frame unread: a reset
    with pytest.raises((PeerError, TransientError)):
        send_for_ever(ends.primary)
    assert ends.primary.ended
    assert said == [Goodbye(reason="the operator stops me")]
    ends.close()


def send_for_ever(link: Link) -> None:
    while True:
        link.send(device_frame(BIG))


def test_finish_lets_the_peer_read_what_was_sent_last(ends: Ends) -> None:
    ends.standby.send(encode(Heartbeat(1, 1), term=TERM))
    assert select.select([ends.primary], [], [], PATIENCE_S)[0]
    ends.primary.send(encode(Goodbye(reason="end"), term=TERM))
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(ends.primary.finish, PATIENCE_S)
        assert decode(*next_frame(ends.standby)) == Goodbye(reason="end")
        with pytest.raises(PeerError, match="closed the connection"):
            until_error(ends.standby)
        ends.standby.close()
        finishing.result(PATIENCE_S)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_foreign_bytes_are_told_at_once(stranger: str) -> None:
    """Also where they are fewer than a header and the stranger waits for an answer."""
    client, link = raw_pair()
    client.sendall(STRANGERS[stranger])
    with pytest.raises(WireError, match="foreign stream") as caught:
        until_error(link)
    assert caught.value.hint is not None
    assert not link.ended, "a peer that is there"
    link.close()
    client.close()


@pytest.mark.parametrize("stranger", ["http", "ssh", "nothing like it"])
def test_foreign_bytes_are_no_tls(stranger: str, certificates: Certificates) -> None:
    server, _ = contexts(certificates)
    listener, address = listener_on_free_port()
    with listener, socket.create_connection((address.host, address.port)) as client:
        assert select.select([listener], [], [], PATIENCE_S)[0]
        link, _ = accept(listener, server)
        client.sendall(STRANGERS[stranger])
        with pytest.raises(PeerError, match="TLS failed") as caught:
            until_error(link)
        assert "insecure" in str(caught.value.hint)
        link.close()


def test_plaintext_to_tls_and_tls_to_plaintext(certificates: Certificates) -> None:
    server, client = contexts(certificates)
    with pytest.raises(PeerError, match="TLS failed") as caught:
        plain_standby_refuses(client)
    assert "insecure" in str(caught.value.hint)

    ends = join(server, None)
    ends.primary.send(encode(Heartbeat(1, 0), term=TERM))
    with pytest.raises(PeerError, match="TLS failed"):
        until_error(ends.standby)
    ends.standby.close()
    # An alert, or nothing but a reset: TLS is named in both.
    with pytest.raises((WireError, TransientError)) as foreign:
        until_error(ends.primary)
    assert "TLS" in str(foreign.value.hint) or "insecure" in str(foreign.value.hint)
    ends.close()


def plain_standby_refuses(client: object) -> None:
    """Connect with TLS to a standby without; it answers with a frame of ours."""
    listener, address = listener_on_free_port()
    with listener, ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, address, client, inbox=ignore)  # type: ignore[arg-type]
        assert select.select([listener], [], [], PATIENCE_S)[0]
        link, _ = accept(listener, None)
        with pytest.raises(WireError, match="foreign stream"):
            until_error(link)
        link.send(encode(Goodbye(reason="what is this"), term=TERM))
        link.close()
        connecting.result(PATIENCE_S)


def test_wrong_authority_and_wrong_host_fail_while_connecting(certificates: Certificates, tmp_path: Path) -> None:
    others = make_certificates(tmp_path / "others")
    elsewhere = make_certificates(tmp_path / "elsewhere", host="10.9.8.7")
    wrong_ca = (contexts(certificates)[0], contexts(others)[1])
    for server, client in (wrong_ca, contexts(elsewhere)):
        with pytest.raises(PeerError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            join(server, client)
        assert "check cert, key and ca" in str(caught.value.hint)


def test_a_refused_client_certificate_is_told_at_the_first_read(certificates: Certificates, tmp_path: Path) -> None:
    """TLS 1.3: the client has finished its handshake before the server looks at its certificate."""
    server, without = contexts(certificates)[0], ssl.create_default_context(cafile=str(certificates.client.ca))
    foreign = make_certificates(tmp_path / "foreign").client
    stranger = TlsTable(cert=foreign.cert, key=foreign.key, ca=certificates.client.ca, insecure=False)
    for client in (without, tls.context(stranger, "client")):
        listener, address = listener_on_free_port()
        with listener, ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(connect, address, client, inbox=ignore)
            assert select.select([listener], [], [], PATIENCE_S)[0]
            standby, _ = accept(listener, server)
            with pytest.raises(PeerError, match="TLS failed"):
                until_error(standby)
            standby.close()
            primary = connecting.result(PATIENCE_S)
        with pytest.raises(PeerError, match="TLS failed") as caught:
            until_error(primary)
        assert "check cert, key and ca" in str(caught.value.hint)
        primary.close()


def test_nobody_there_is_transient() -> None:
    listener, address = listener_on_free_port()
    listener.close()
    with pytest.raises(TransientError, match="refused"):
        connect(address, None, inbox=ignore)


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "no.such.host.invalid"])
def test_an_impossible_name_is_an_error_of_ours(host: str) -> None:
    with pytest.raises(KageError):
        connect(Address(host=host, port=1), None, inbox=ignore)
    with pytest.raises(ConfigError, match=r"standby\.listen"):
        listen(Address(host=host, port=1))


def test_an_address_in_use_names_the_key() -> None:
    listener, address = listener_on_free_port()
    with listener, pytest.raises(ConfigError, match=r"standby\.listen .*in use"):
        listen(address)


def test_ipv6(certificates: Certificates) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as probe:
        port = probe.getsockname()[1]
    address = Address(host="::1", port=port)
    with listen(address) as listener:
        link = connect(address, None, inbox=ignore)
        assert select.select([listener], [], [], PATIENCE_S)[0]
        accepted, peer = accept(listener, None)
        assert peer.startswith("[::1]:")
        link.send(encode(Heartbeat(1, 0), term=TERM))
        assert decode(*next_frame(accepted)) == Heartbeat(1, 0)
        link.close()
        accepted.close()


@pytest.mark.parametrize("missing", ["cert", "key", "ca"])
@pytest.mark.parametrize("damage", ["gone", "garbage", "empty"])
def test_unusable_files_name_the_key(certificates: Certificates, tmp_path: Path, missing: str, damage: str) -> None:
    bad = tmp_path / "bad.pem"
    if damage != "gone":
        bad.write_bytes(b"not a certificate\n" if damage == "garbage" else b"")
    files = {name: getattr(certificates.client, name) for name in ("cert", "key", "ca")}
    with pytest.raises(ConfigError, match=rf"tls\.{missing}"):
        tls.context(TlsTable(**{**files, missing: bad}), "client")


def test_a_key_of_another_certificate_names_the_keys(certificates: Certificates) -> None:
    files = certificates.client
    with pytest.raises(ConfigError, match=r"tls\.cert / tls\.key"):
        tls.context(TlsTable(cert=files.cert, key=certificates.server.key, ca=files.ca), "client")


def test_a_frame_sent_byte_by_byte_is_one_frame() -> None:
    """And every byte of it is a sign of life."""
    client, link = raw_pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    frame = device_frame(40, epoch=Epoch(3))
    received = None
    for byte in pack_frame(frame, sequence=0) + bytes(frame.parts[0]):
        assert received is None
        before = link.heard_t
        client.send(bytes([byte]))
        assert select.select([link], [], [], PATIENCE_S)[0]
        received = link.receive()
        assert link.heard_t > before
    assert received is not None
    assert (received[0].epoch, bytes(received[1])) == (3, b"\x5a" * 40)
    client.close()
    link.close()


# --- sending without waiting ------------------------------------------------------------------------------------------


def test_what_is_offered_never_waits_and_arrives_in_order(ends: Ends) -> None:
    """More than the kernel ever takes (tcp_rmem and tcp_wmem: 32 and 4 MB), to a peer that does not read meanwhile."""
    frames = [device_frame(256 << 10, fill=number) for number in range(160)]
    for frame in frames:
        ends.primary.offer(frame)
    assert ends.primary.waiting_bytes > 0
    for frame in frames:
        while (received := ends.standby.receive()) is None:
            ends.primary.flush()
        assert bytes(received[1]) == b"".join(frame.parts)
    assert ends.primary.flush()
    assert ends.primary.waiting_bytes == 0


def test_offering_to_a_peer_that_is_gone(ends: Ends) -> None:
    ends.standby.close()
    with pytest.raises((TransientError, PeerError)):
        offer_for_ever(ends.primary)


def offer_for_ever(link: Link) -> None:
    while True:
        link.offer(device_frame(1000))
