"""Saves, restores and erases the content of a slot: states on the engine thread, files on a worker thread.

Each call on the engine thread moves few states, so that the gaps between tokens of running requests hardly grow.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from functools import partial
from pathlib import Path

from msgspec import Struct

from engine.checksummed import DamagedFile
from engine.contract import EngineFault, RequestRefused
from engine.kv.sequence_file import SequencePart, SequenceReader, SequenceWriter
from engine.kv.transfer import Exported
from engine.slots import NO_CONTENT, SlotContent
from engine.step import EngineCore
from engine.thread import EngineThread

# Maximum time for exporting states between two steps.
EXPORT_SECONDS = 0.01
# Pause before the next export while blocks are being read from disk.
RETRY_SECONDS = 0.005
# Bytes of states that are read from a file and imported at once.
READ_CHUNK_BYTES = 2**24


class SlotTransfer(Struct, frozen=True):
    """The size and duration of a save or restore."""

    tokens: int
    bytes: int
    """Size of the file."""
    seconds: float


class SlotFiles:
    """The files of the slots of one engine. `layout` names the format of the states."""

    def __init__(self, thread: EngineThread, layout: str) -> None:
        self._thread = thread
        self._layout = layout

    async def save(self, number: int, path: Path) -> SlotTransfer:
        """Writes to `path` the tokens and states of the content of slot `number`, as far as they are resident or
        stored, whole or not at all.

        Raises RequestRefused if there is no such slot, nothing to save, or another kind of file at `path`, and
        EngineFault if the file cannot be written.
        """
        begun, thread, digest = time.perf_counter(), self._thread, await _content_digest(self._thread)
        content, identity = await thread.query(
            lambda core: (core.slots.content(number), _identity(core, self._layout, digest))
        )
        try:
            file = await asyncio.to_thread(SequenceWriter, path, identity, content.salt)
            try:
                tokens = await _write_parts(thread, content, file)
                if not tokens:
                    raise RequestRefused(
                        f"Nothing of the content of slot {number} is cached any more.", field="id_slot"
                    )
                size = await asyncio.to_thread(file.commit)
            finally:
                file.discard()
        except OSError as error:
            raise EngineFault(f"The file {path.name!r} cannot be written: {error.strerror}.") from error
        except DamagedFile:
            raise RequestRefused(
                f"The file {path.name!r} is not a slot file and would be lost; send another name.", field="filename"
            ) from None
        return SlotTransfer(tokens, size, time.perf_counter() - begun)

    async def restore(self, number: int, path: Path) -> SlotTransfer:
        """Loads the states in the file `path` into the offload tiers, where the next request with this prefix finds
        them, and sets the slot's content to the file's tokens.

        Raises RequestRefused if the tiers have no space for any of the states. Raises RequestRefused, with the slot's
        content unchanged, if the slot is busy, there is no offload tier, or the file is damaged or of another model.
        """
        begun, thread, digest = time.perf_counter(), self._thread, await _content_digest(self._thread)
        identity = await thread.query(lambda core: _check_restorable(core, number, self._layout, digest))
        try:
            file = await asyncio.to_thread(_open, path, identity)
            try:
                content = await _import_parts(thread, file)
            finally:
                file.close()
        except OSError as error:
            raise RequestRefused(
                f"The file {path.name!r} cannot be read: {error.strerror}.", field="filename"
            ) from None
        except DamagedFile as error:
            raise RequestRefused(f"The file {path.name!r} cannot be used: {error}.", field="filename") from None
        tokens = await thread.query(lambda core: _set_content(core, number, content))
        return SlotTransfer(tokens, file.bytes, time.perf_counter() - begun)

    async def erase(self, number: int) -> int:
        """Empties slot `number`, and drops from cells, RAM and disk those states of its content that no other sequence
        shares.

        Returns the number of tokens dropped. Raises RequestRefused if the slot is busy.
        """
        return await self._thread.query(lambda core: _erase(core, number))


async def _write_parts(thread: EngineThread, content: SlotContent, file: SequenceWriter) -> int:
    """Writes the resident or stored prefix of `content`. Returns the length of the prefix in tokens."""
    end, more = 0, True
    while more:
        parts, more = await thread.query(partial(_export, content, end))
        if parts:
            await asyncio.to_thread(file.write, parts)
            end = parts[-1].end
        elif more:
            await asyncio.sleep(RETRY_SECONDS)
    return end


def _export(content: SlotContent, start: int, core: EngineCore) -> Exported:
    return core.kv.transfer.export(*content, start, EXPORT_SECONDS)


def _check_restorable(core: EngineCore, number: int, layout: str, digest: str) -> str:
    """Returns the identity that a file must have. Raises RequestRefused if no file can be restored into the slot
    now."""
    core.slots.idle(number)
    if not core.kv.offloads:
        raise RequestRefused("Slots are restored into RAM: serve with a --cache-ram other than 0.")
    return _identity(core, layout, digest)


def _open(path: Path, identity: str) -> SequenceReader:
    if not path.is_file():  # a pipe would block
        raise RequestRefused(f"There is no file {path.name!r}.", field="filename")
    return SequenceReader(path, identity)


async def _import_parts(thread: EngineThread, file: SequenceReader) -> SlotContent:
    """Puts all parts of a file into the offload tiers. Returns the tokens of the parts, with the salt."""
    tokens = array("i")
    while parts := await asyncio.to_thread(file.read, READ_CHUNK_BYTES):
        if not _consecutive(parts, len(tokens)):
            raise DamagedFile("its parts are not consecutive")
        for part in parts:
            tokens.extend(part.tokens)
        await thread.query(partial(_import, SlotContent(tokens[:], file.salt), parts))
    return SlotContent(tokens, file.salt)


def _import(content: SlotContent, parts: list[SequencePart], core: EngineCore) -> None:
    core.kv.transfer.put(*content, parts)


def _consecutive(parts: list[SequencePart], start: int) -> bool:
    ends = [start, *(part.end for part in parts)]
    return all(part.start == end for part, end in zip(parts, ends, strict=False))


def _set_content(core: EngineCore, number: int, content: SlotContent) -> int:
    tokens = core.kv.transfer.known_length(*content)
    if not tokens:
        raise RequestRefused("There is no space for any of the states: serve with a larger --cache-ram.")
    core.slots.set_last_content(number, SlotContent(content.tokens[:tokens], content.salt))
    return tokens


def _erase(core: EngineCore, number: int) -> int:
    erased = core.kv.transfer.erase(*core.slots.idle(number).last_content)
    core.slots.set_last_content(number, NO_CONTENT)
    return erased


async def _content_digest(thread: EngineThread) -> str:
    """Returns the digest of the model's files. Waits until they are hashed, which takes a second for each gigabyte at
    the first start with these files."""
    digest: str = await asyncio.wrap_future(thread.contents.future())
    return digest


def _identity(core: EngineCore, layout: str, digest: str) -> str:
    return f"{layout} {digest} {'blocks' if core.context.divisible else 'whole'}"
