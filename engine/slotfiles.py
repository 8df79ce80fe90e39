"""Saves, restores and erases what a slot ran last: states on the engine thread, files on a worker thread.

Between two steps only so much is moved that the gaps between tokens hardly grow.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from msgspec import Struct

from engine.contract import EngineFault, RequestRefused
from engine.kv.record import Damaged
from engine.kv.sequence_file import Part, Reader, Writer
from engine.kv.transfer import Exported
from engine.runner import Runner
from engine.slots import NOTHING, Text

# Seconds for which states are gathered between two steps.
GATHER_SECONDS = 0.01
# Seconds until the engine is asked again for blocks that are being read from disk.
RETRY_SECONDS = 0.005
# Bytes of states that are read from a file and then given to the engine at a time.
READ_CHUNK_BYTES = 2**24

Answer = TypeVar("Answer")


class Ask(Protocol):
    """`engine.Engine.ask`."""

    async def __call__(self, function: Callable[[Runner], Answer], /) -> Answer:
        """The result of `function` on the engine thread."""


class Moved(Struct, frozen=True):
    """The size of what was saved or restored."""

    tokens: int
    bytes: int
    """Size of the file."""
    seconds: float


async def save(ask: Ask, number: int, path: Path, layout: str) -> Moved:
    """Writes the tokens and states of what slot `number` runs or ran last, as far as they are kept, to `path`, whole or
    not at all.

    `layout` names the format of the states. Raises RequestRefused if there is nothing, EngineFault if the file
    cannot be written.
    """
    begun = time.perf_counter()
    text, identity = await ask(lambda runner: (runner.slots.text(number), _identity(runner, layout)))
    try:
        file = await asyncio.to_thread(Writer, path, identity, text.salt)
        try:
            tokens = await _gather(ask, text, file)
            if not tokens:
                raise RequestRefused(f"Nothing of what slot {number} ran last is kept any more.", field="id_slot")
            size = await asyncio.to_thread(file.commit)
        finally:
            file.discard()
    except OSError as error:
        raise EngineFault(f"The file {path.name!r} cannot be written: {error.strerror}.") from error
    return Moved(tokens, size, time.perf_counter() - begun)


async def _gather(ask: Ask, text: Text, file: Writer) -> int:
    """Writes the parts of `text` that are kept. Returns their number of tokens."""
    end, more = 0, True
    while more:
        parts, more = await ask(partial(_gathered, text, end))
        if parts:
            await asyncio.to_thread(file.write, parts)
            end = parts[-1].end
        elif more:
            await asyncio.sleep(RETRY_SECONDS)
    return end


def _gathered(text: Text, start: int, runner: Runner) -> Exported:
    return runner.kv.transfer.gather(*text, start, GATHER_SECONDS)


async def restore(ask: Ask, number: int, path: Path, layout: str) -> Moved:
    """Puts the blocks of a file into the offload tiers; slot `number` counts as having run them last.

    Raises RequestRefused, with nothing changed, if the slot is busy, there is no offload tier, or the file is not
    a whole one of this `layout`; and also if the tiers have no room for any of it.
    """
    begun = time.perf_counter()
    identity = await ask(lambda runner: _ready(runner, number, layout))
    try:
        file = await asyncio.to_thread(_open, path, identity)
        try:
            text = await _put(ask, file)
        finally:
            file.close()
    except OSError as error:
        raise RequestRefused(f"The file {path.name!r} cannot be read: {error.strerror}.", field="filename") from None
    except Damaged as error:
        raise RequestRefused(f"The file {path.name!r} cannot be used: {error}.", field="filename") from None
    tokens = await ask(lambda runner: _remember(runner, number, text))
    return Moved(tokens, file.bytes, time.perf_counter() - begun)


def _ready(runner: Runner, number: int, layout: str) -> str:
    """The identity that a file must have to be restored now."""
    runner.slots.idle(number)
    if not runner.kv.offloads:
        raise RequestRefused("Slots are restored into RAM, of which --cache-ram leaves none here.")
    return _identity(runner, layout)


def _open(path: Path, identity: str) -> Reader:
    if not path.is_file():  # a pipe would block
        raise RequestRefused(f"There is no file {path.name!r}.", field="filename")
    return Reader(path, identity)


async def _put(ask: Ask, file: Reader) -> Text:
    """Puts all parts of a file into the offload tiers. Returns their tokens."""
    tokens = array("i")
    while parts := await asyncio.to_thread(file.read, READ_CHUNK_BYTES):
        if not _continue(parts, len(tokens)):
            raise Damaged("its parts do not continue each other")
        for part in parts:
            tokens.extend(part.tokens)
        await ask(partial(_kept, Text(tokens[:], file.salt), parts))
    return Text(tokens, file.salt)


def _kept(text: Text, parts: list[Part], runner: Runner) -> None:
    runner.kv.transfer.put(*text, parts)


def _continue(parts: list[Part], start: int) -> bool:
    ends = [start, *(part.end for part in parts)]
    return all(part.start == end for part, end in zip(parts, ends, strict=False))


def _remember(runner: Runner, number: int, text: Text) -> int:
    tokens = runner.kv.transfer.known(*text)
    if not tokens:
        raise RequestRefused("There is no room for any of it: serve with a larger --cache-ram.")
    runner.slots.remember(number, Text(text.tokens[:tokens], text.salt))
    return tokens


async def erase(ask: Ask, number: int) -> int:
    """Drops what slot `number` ran last as far as no other sequence begins so. Returns the number of tokens dropped.

    Raises RequestRefused if the slot is busy.
    """
    return await ask(lambda runner: _erase(runner, number))


def _erase(runner: Runner, number: int) -> int:
    text = runner.slots.idle(number).last
    erased = runner.kv.transfer.erase(*text)
    runner.slots.remember(number, NOTHING)
    return erased


def _identity(runner: Runner, layout: str) -> str:
    return f"{layout} {'blocks' if runner.context.divisible else 'whole'}"
