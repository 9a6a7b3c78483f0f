"""The format's document: its table of types and its example are what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from tests.harness.wire import EPOCH, TERM, receive_stream

from kagemusha.model.memory import PAGE_BYTES
from kagemusha.wire.frame import MAX_PAYLOAD_BYTES, WITH_EPOCH, FrameType, pack_frame
from kagemusha.wire.messages import CHUNK_TYPES, MESSAGE_TYPES, Ack, StructMessage, encode
from kagemusha.wire.switch import SWITCH_MESSAGE_TYPES, SwitchRefusal
from kagemusha.wire.switch_structs import OutputMode

DOCUMENT = (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text(encoding="utf-8")
ALL_TYPES = MESSAGE_TYPES | SWITCH_MESSAGE_TYPES
EXAMPLES = [bytes.fromhex(re.sub(r"#.*", "", block)) for block in re.findall(r"```hex\n(.*?)```", DOCUMENT, re.DOTALL)]


def test_table_of_types() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \| \w+ \| (.+?) \| (\w+) \| (\d+) \|$", DOCUMENT, re.MULTILINE)
    assert {(int(number), name) for number, name, _, _, _ in rows} == {(k.value, k.name) for k in FrameType}
    for number, _, epoch, payload, limit in rows:
        kind = FrameType(int(number))
        assert MAX_PAYLOAD_BYTES[kind] == int(limit)
        assert (epoch == "n") is (kind in WITH_EPOCH)
        assert payload == form_of(kind)


def form_of(kind: FrameType) -> str:
    if kind in CHUNK_TYPES:
        return "block"
    if MAX_PAYLOAD_BYTES[kind] == 0:
        return "empty"
    if kind is FrameType.INBOUND_FRAMES:
        return "batch"
    if kind is FrameType.HELD_OUTPUT:
        return "frames"
    if kind is FrameType.RULE_SET:
        return "rules"
    return "struct" if issubclass(ALL_TYPES[kind], StructMessage) else "JSON"


def test_struct_sizes() -> None:
    rows = re.findall(r"^\| ([A-Z_]+) \| (\w[\w ]* u\d\d.*) \|$", DOCUMENT, re.MULTILINE)
    sizes = {
        name: sum(int(bits) // 8 for bits in re.findall(r"u(\d\d)\b", fields)) + 16 * ("16 bytes" in fields)
        for name, fields in rows
    }
    assert sizes == {k.name: MAX_PAYLOAD_BYTES[k] for k in ALL_TYPES if form_of(k) == "struct"}


def test_words_of_the_switch() -> None:
    codes = re.search(r"^\| SWITCH_REFUSED \| `code` \((.*?)\)", DOCUMENT, re.MULTILINE)
    assert codes is not None
    assert codes[1] == ", ".join(f"`{code}`" for code in SwitchRefusal)
    assert ", ".join(f"{mode.value} {mode.name}" for mode in OutputMode) in DOCUMENT


def test_example_checkpoint() -> None:
    stream, _ = EXAMPLES
    received = receive_stream(stream)
    assert received.committed()
    assert received.assembler is not None
    got = received.assembler.statistics()
    assert received.buffers.runs[: got.runs].tolist() == [(5, 1, 0), (9, 2, 1)]
    assert (received.buffers.data[: got.data_bytes] == 0xAB).all()
    assert got.data_bytes == PAGE_BYTES
    assert received.buffers.device[: got.device_bytes].tobytes() == b"QEVM"
    assert f"{len(stream)} bytes" in DOCUMENT


def test_example_acknowledgement() -> None:
    _, acknowledgement = EXAMPLES
    assert acknowledgement == pack_frame(encode(Ack(EPOCH), term=TERM), sequence=1)
