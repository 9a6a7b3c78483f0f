"""What makes a checkpoint whole, for both ends.

A checkpoint is one CHECKPOINT_BEGIN, its page and device state chunks in any mixture (each kind in its own
order), and one CHECKPOINT_END with counts and the digest of ``tally.py``.

Invariant: :class:`CheckpointAssembler` is complete only if all of it is there and verified; after any
error it is discarded for good. This module does not apply pages, and it acknowledges nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Final, Protocol

import numpy as np

from kagemusha.errors import BugError, WireError
from kagemusha.model.ids import Epoch, Term
from kagemusha.model.memory import PAGE_BYTES, RUN_DATA, Bytes, MemoryImage, Runs
from kagemusha.wire.block import BlockCodec, parse_block
from kagemusha.wire.frame import BLOCK_HEADER_BYTES, CHUNK_BYTES, Frame, FrameHeader, FrameType, make_frame
from kagemusha.wire.messages import CheckpointBegin, CheckpointEnd, encode
from kagemusha.wire.pages import ChunkStatistics, chunk_count, chunk_runs, decode_chunk, encode_chunk
from kagemusha.wire.tally import StreamTotals, Tally

_OPERATION: Final = "assemble checkpoint"


class CheckpointBuffers(Protocol):
    """Where a checkpoint lies, on either end: page runs, their contents, device state with the rule set behind it.

    A side that receives checks every size against these before it writes.
    """

    runs: Runs
    data: Bytes
    device: Bytes


class OutgoingCheckpoint:
    """Makes the frames of one checkpoint. The buffers must stay as they are until the last frame is sent."""

    def __init__(
        self,
        epoch: Epoch,
        buffers: CheckpointBuffers,
        *,
        term: Term,
        parts: Sequence[int],
        data_bytes: int,
        device_bytes: int,
        rules_bytes: int,
        inbound_seen: int,
        switch_session: int,
        codec: BlockCodec,
    ) -> None:
        """Parameters as in ``SealedCheckpoint``: runs of each part, bytes of contents, device state and rule set, and
        the last inbound frame, and the session at the switch.
        """
        self._epoch = epoch
        self._term = term
        self._codec = codec
        self._parts = _slices(buffers, parts, data_bytes)
        self._device_bytes = device_bytes
        self._rules_bytes = rules_bytes
        self._inbound_seen = inbound_seen
        self._switch_session = switch_session
        self._state = buffers.device[: device_bytes + rules_bytes]
        self._tally = Tally()

    def frames(self) -> Iterator[Frame]:
        """All frames, each made (zero pages found, compressed) when it is asked for. Once only."""
        if self._tally.totals().wire_bytes:
            raise BugError("the frames of a checkpoint can be made once", operation="send", epoch=self._epoch)
        begin = encode(
            CheckpointBegin(
                self._epoch,
                page_chunks=sum(chunk_count(runs) for runs, _ in self._parts),
                page_bytes=sum(int(runs["count"].sum(dtype=np.int64)) for runs, _ in self._parts) * PAGE_BYTES,
                device_bytes=self._device_bytes,
                rules_bytes=self._rules_bytes,
                inbound_seen=self._inbound_seen,
                switch_session=self._switch_session,
            ),
            term=self._term,
        )
        self._tally.add_frame(begin)
        yield begin
        for runs, data in self._parts:
            for frame, chunk in page_frames(runs, data, term=self._term, epoch=self._epoch, codec=self._codec):
                self._tally.add_pages(frame, chunk)
                yield frame
        yield from self._state_frames()
        tally = self._tally
        end = encode(
            CheckpointEnd(
                self._epoch,
                tally.page_chunks,
                tally.device_chunks,
                tally.runs,
                tally.data_bytes,
                tally.digest(),
            ),
            term=self._term,
        )
        tally.add_end(end)
        yield end

    def statistics(self) -> StreamTotals:
        """What the frames made so far hold."""
        return self._tally.totals(self._rules_bytes)

    def _state_frames(self) -> Iterator[Frame]:
        for offset in range(0, len(self._state), CHUNK_BYTES):
            piece = self._state[offset : offset + CHUNK_BYTES]
            parts = self._codec.compress(piece, extra=offset)
            frame = make_frame(FrameType.DEVICE_STATE, term=self._term, epoch=self._epoch, parts=parts)
            self._tally.add_device(frame, len(piece))
            yield frame


def page_frames(
    runs: Runs, data: Bytes, *, term: Term, epoch: Epoch, codec: BlockCodec
) -> Iterator[tuple[Frame, ChunkStatistics]]:
    """Page chunk frames for ascending runs and their contents, each with what it holds."""
    for chunk, contents in chunk_runs(runs, data):
        parts, statistics = encode_chunk(chunk, contents, codec)
        yield make_frame(FrameType.PAGE_CHUNK, term=term, epoch=epoch, parts=parts), statistics


def _slices(buffers: CheckpointBuffers, parts: Sequence[int], data_bytes: int) -> list[tuple[Runs, Bytes]]:
    """Runs and contents of each part, as views."""
    slices = []
    first = offset = 0
    for count in parts:
        runs = buffers.runs[first : first + count]
        size = int(runs["count"][runs["kind"] == RUN_DATA].sum(dtype=np.int64)) * PAGE_BYTES
        slices.append((runs, buffers.data[offset : offset + size]))
        first += count
        offset += size
    if offset != data_bytes:
        raise BugError(f"the parts name {offset} bytes of pages, not {data_bytes}", operation="send checkpoint")
    return slices


class AssemblyState(enum.Enum):
    """How far an assembler is."""

    EMPTY = "empty"  # nothing came
    OPEN = "open"  # the begin came
    COMPLETE = "complete"  # all came and is verified
    DISCARDED = "discarded"  # something was wrong, or it was abandoned: the buffers hold nothing of use


class CheckpointAssembler:
    """Takes the frames of one checkpoint into buffers, each filled from its start."""

    def __init__(
        self, epoch: Epoch, buffers: CheckpointBuffers, *, term: Term, image: MemoryImage, codec: BlockCodec
    ) -> None:
        """Expect checkpoint ``epoch`` of ``term`` for the RAM blocks of ``image``."""
        self._epoch = epoch
        self._buffers = buffers
        self._term = term
        self._image = image
        self._codec = codec
        self._begin: CheckpointBegin | None = None
        self._tally = Tally()
        self._state = AssemblyState.EMPTY

    @property
    def state(self) -> AssemblyState:
        """How far it is."""
        return self._state

    @property
    def complete(self) -> bool:
        """Whether the whole checkpoint is in the buffers, verified."""
        return self._state is AssemblyState.COMPLETE

    def add(self, header: FrameHeader, payload: memoryview) -> bool:
        """Take the next frame, as a ``FrameReader`` let it through; returns :attr:`complete`.

        :raise WireError: anything is wrong with it; the checkpoint is discarded.
        :raise BugError: called after the end.
        """
        if self._state not in (AssemblyState.EMPTY, AssemblyState.OPEN):
            raise BugError(f"checkpoint is {self._state.value}", operation=_OPERATION, epoch=self._epoch)
        try:
            self._take(header, payload)
        except WireError as error:
            self._state = AssemblyState.DISCARDED
            error.epoch = self._epoch
            raise
        except BaseException:
            self._state = AssemblyState.DISCARDED
            raise
        return self.complete

    def abandon(self) -> bool:
        """No more will come. Returns whether a part of a checkpoint was thrown away; a complete one stays."""
        partial = self._state is AssemblyState.OPEN
        if not self.complete:
            self._state = AssemblyState.DISCARDED
        return partial

    @property
    def inbound_seen(self) -> int:
        """Number of the last frame that the checkpoint's guest has read from its NIC; 0: not known."""
        return 0 if self._begin is None else self._begin.inbound_seen

    @property
    def switch_session(self) -> int:
        """In which the switch has sealed the checkpoint's output; 0: in none."""
        return 0 if self._begin is None else self._begin.switch_session

    def statistics(self) -> StreamTotals:
        """What came so far. Of a complete checkpoint: the lengths used of the buffers."""
        return self._tally.totals(self._begin.rules_bytes if self._begin is not None else 0)

    def _take(self, header: FrameHeader, payload: memoryview) -> None:
        if header.term != self._term or header.epoch != self._epoch:
            raise WireError(
                f"{header.kind.name} of term {header.term}, epoch {header.epoch} "
                f"where term {self._term}, epoch {self._epoch} is due",
                operation=_OPERATION,
            )
        if self._begin is None:
            self._take_begin(header, payload)
        elif header.kind is FrameType.PAGE_CHUNK:
            self._take_pages(header, payload, self._begin)
        elif header.kind is FrameType.DEVICE_STATE:
            self._take_device(header, payload, self._begin)
        elif header.kind is FrameType.CHECKPOINT_END:
            self._take_end(header, payload, self._begin)
        else:
            raise WireError(f"{header.kind.name} inside a checkpoint", operation=_OPERATION)

    def _take_begin(self, header: FrameHeader, payload: memoryview) -> None:
        if header.kind is not FrameType.CHECKPOINT_BEGIN:
            raise WireError(f"{header.kind.name} before the begin", operation=_OPERATION)
        begin = CheckpointBegin.parse(header, payload)
        for what, size, room in (
            ("pages", begin.page_bytes, len(self._buffers.data)),
            ("device state and rules", begin.device_bytes + begin.rules_bytes, len(self._buffers.device)),
        ):
            if size > room:
                raise WireError(f"{size} bytes of {what} announced, there is room for {room}", operation=_OPERATION)
        self._begin = begin
        self._tally.add_frame(header)
        self._state = AssemblyState.OPEN

    def _take_pages(self, header: FrameHeader, payload: memoryview, begin: CheckpointBegin) -> None:
        tally = self._tally
        rest = self._buffers.data[tally.data_bytes : begin.page_bytes]
        runs, size = decode_chunk(payload, self._image, rest, self._codec)
        end = tally.runs + len(runs)
        if end > len(self._buffers.runs):
            raise WireError(f"more than {len(self._buffers.runs)} page runs", operation=_OPERATION)
        self._buffers.runs[tally.runs : end] = runs
        pages = int(runs["count"].sum(dtype=np.int64))
        tally.add_pages(header, ChunkStatistics(len(runs), size, pages * PAGE_BYTES - size))
        if tally.page_chunks > begin.page_chunks or tally.data_bytes + tally.zero_bytes > begin.page_bytes:
            raise WireError("more pages than announced", operation=_OPERATION)

    def _take_device(self, header: FrameHeader, payload: memoryview, begin: CheckpointBegin) -> None:
        block = parse_block(payload)
        offset = self._tally.state_bytes
        if block.extra != offset or block.raw_bytes == 0:
            raise WireError(
                f"{block.raw_bytes} bytes of device state at {block.extra}, expected at {offset}",
                operation=_OPERATION,
            )
        rest = self._buffers.device[offset : begin.device_bytes + begin.rules_bytes]
        self._codec.decompress(block, payload[BLOCK_HEADER_BYTES:], rest)
        self._tally.add_device(header, block.raw_bytes)

    def _take_end(self, header: FrameHeader, payload: memoryview, begin: CheckpointBegin) -> None:
        end = CheckpointEnd.parse(header, payload)
        tally = self._tally
        ours = (tally.page_chunks, tally.device_chunks, tally.runs, tally.data_bytes)
        if ours != (end.page_chunks, end.device_chunks, end.runs, end.data_bytes):
            raise WireError(
                f"chunks are missing or too many: (page chunks, device chunks, runs, bytes) are {ours}, "
                f"the end says {(end.page_chunks, end.device_chunks, end.runs, end.data_bytes)}",
                operation=_OPERATION,
            )
        came = (tally.page_chunks, tally.data_bytes + tally.zero_bytes, tally.state_bytes)
        announced = (begin.page_chunks, begin.page_bytes, begin.device_bytes + begin.rules_bytes)
        if came != announced:
            raise WireError(
                f"(page chunks, page bytes, state bytes) are {came}, the begin says {announced}",
                operation=_OPERATION,
            )
        if tally.digest() != end.digest:
            raise WireError("digest mismatch: chunks were exchanged, altered or foreign", operation=_OPERATION)
        tally.add_end(header)
        self._state = AssemblyState.COMPLETE
