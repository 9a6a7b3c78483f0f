"""Streams of wire frames for tests: a tiny image, checkpoints in it, and a receiver of whole streams.

:func:`receive_stream` is the fuzz target of the wire format: for any bytes it returns what a receiver
would have taken, or raises WireError; any other exception is a finding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kagemusha.errors import WireError
from kagemusha.model.config import Compression
from kagemusha.model.ids import NO_EPOCH, Epoch, Term
from kagemusha.model.memory import (
    PAGE_BYTES,
    RUN_DATA,
    RUN_DTYPE,
    Bytes,
    MemoryImage,
    RamBlock,
    Runs,
)
from kagemusha.wire.block import BlockCodec
from kagemusha.wire.checkpoint import AssemblyState, CheckpointAssembler, OutgoingCheckpoint
from kagemusha.wire.frame import HEADER_BYTES, Frame, FrameType, pack_frame
from kagemusha.wire.messages import CHUNK_TYPES, Message, decode
from kagemusha.wire.reader import FrameReader
from kagemusha.wire.sync import SyncAssembler

TERM = Term(3)
EPOCH = Epoch(7)
IMAGE = MemoryImage((RamBlock("pc.ram", 0x7F00_0000_0000, 600 * PAGE_BYTES), RamBlock("vga.vram", 0, 16 << 12)))
"""pc.ram: pages 0 to 599, then a gap; vga.vram: pages 1024 to 1039."""


def run_table(*runs: tuple[int, int, int]) -> Runs:
    """A run table of (page, count, kind)."""
    return np.array(list(runs), RUN_DTYPE)


def pages_of(*fills: int) -> Bytes:
    """One page per number, filled with it."""
    return np.repeat(np.array(fills, np.uint8), PAGE_BYTES)


@dataclass
class Buffers:
    """Where a checkpoint lies."""

    runs: Runs = field(default_factory=lambda: np.zeros(2048, RUN_DTYPE))
    data: Bytes = field(default_factory=lambda: np.zeros(1024 * PAGE_BYTES, np.uint8))
    device: Bytes = field(default_factory=lambda: np.zeros(4 << 20, np.uint8))


def filled(parts: Sequence[Runs], data: Bytes, device: bytes) -> Buffers:
    """Buffers with this checkpoint in them."""
    runs = np.concatenate(parts) if parts else run_table()
    return Buffers(runs, data, np.frombuffer(device, np.uint8))


def checkpoint(
    parts: Sequence[Runs],
    data: Bytes,
    device: bytes,
    *,
    rules: bytes = b"",
    inbound_seen: int = 0,
    switch_session: int = 0,
    epoch: Epoch = EPOCH,
    term: Term = TERM,
    compression: Compression = "none",
) -> OutgoingCheckpoint:
    """A checkpoint to be sent."""
    return OutgoingCheckpoint(
        epoch,
        filled(parts, data, device + rules),
        term=term,
        parts=tuple(len(part) for part in parts),
        data_bytes=len(data),
        device_bytes=len(device),
        rules_bytes=len(rules),
        inbound_seen=inbound_seen,
        switch_session=switch_session,
        codec=BlockCodec(compression),
    )


def wire_bytes(frames: Iterable[Frame], *, first_sequence: int = 0) -> bytes:
    """The frames as they cross the link."""
    return b"".join(
        pack_frame(frame, sequence=first_sequence + index) + b"".join(frame.parts) for index, frame in enumerate(frames)
    )


@dataclass
class Received:
    """What a receiver took from a stream."""

    messages: list[Message] = field(default_factory=list)
    buffers: Buffers = field(default_factory=Buffers)
    assembler: CheckpointAssembler | None = None
    sync: SyncAssembler | None = None
    memory: Bytes = field(default_factory=lambda: np.zeros(IMAGE.pages * PAGE_BYTES, np.uint8))

    def committed(self) -> bool:
        """Whether the checkpoint may be acknowledged."""
        return self.assembler is not None and self.assembler.complete


def receive_stream(stream: bytes | bytearray, *, memory: Bytes | None = None) -> Received:
    """Read a stream to its end as a standby does: messages, synchronisation, one checkpoint.

    :param memory: what the standby's memory holds before; zeros by default.
    """
    received = Received() if memory is None else Received(memory=memory)
    codec = BlockCodec()
    received.assembler = CheckpointAssembler(EPOCH, received.buffers, term=TERM, image=IMAGE, codec=codec)
    received.sync = SyncAssembler(term=TERM, image=IMAGE, codec=codec)
    reader = FrameReader()
    scratch = np.empty(1 << 20, np.uint8)
    view = memoryview(stream)
    while view:
        if len(view) < HEADER_BYTES:
            reader.take_end(len(view))
        header = reader.take_header(view[:HEADER_BYTES])
        view = view[HEADER_BYTES:]
        if len(view) < reader.needed:
            reader.take_end(len(view))
        payload = reader.take_payload(view[: header.length])
        view = view[header.length :]
        in_sync = header.kind in CHUNK_TYPES and header.epoch == NO_EPOCH
        if in_sync or header.kind in (FrameType.SYNC_BEGIN, FrameType.SYNC_END):
            if received.sync.complete:
                raise WireError("frame after the end")
            chunk = received.sync.add(header, payload, scratch)
            if chunk is not None:
                write_pages(received.memory, *chunk)
        elif header.kind in CHUNK_TYPES or header.kind in (
            FrameType.CHECKPOINT_BEGIN,
            FrameType.CHECKPOINT_END,
        ):
            if received.assembler.state is AssemblyState.COMPLETE:
                raise WireError("frame after the end")
            received.assembler.add(header, payload)
        else:
            received.messages.append(decode(header, payload))
    reader.take_end()
    return received


def write_pages(memory: Bytes, runs: Runs, data: Bytes) -> None:
    """Apply runs to a memory image, the plain way."""
    offset = 0
    for page, count, kind in runs.tolist():
        start, size = page * PAGE_BYTES, count * PAGE_BYTES
        if kind == RUN_DATA:
            memory[start : start + size] = data[offset : offset + size]
            offset += size
        else:
            memory[start : start + size] = 0
    assert offset == len(data)
