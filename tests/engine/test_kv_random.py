"""Random operations on the KV cache, in both layouts and for each kind of state; each operation is followed by a
check."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec import Struct

from engine.kv import Allocation, Costs, KVCache, Offload
from engine.kv.block import BLOCK_TOKENS, Block, key_of, root_key
from engine.kv.changes import BlockChange, BlockMedium
from engine.kv.sequence_file import SequencePart
from tests.sizes import sized
from tests.toy import VOCABULARY, ToyContext

SEEDS, OPERATIONS = sized(40, 400), 150
SLOTS = 4
CELLS = 160
KINDS: dict[str, dict[str, Any]] = {
    "unified": {"unified": True},
    "unified, whole states": {"unified": True, "partial": False},
    "unified, sliding window": {"unified": True, "window": 8},
    "per-slot": {"unified": False},
    "per-slot, whole states": {"unified": False, "partial": False},
    "per-slot, sliding window": {"unified": False, "divisible": False, "window": 8},
}


class RunningSequence(Struct):
    """A running sequence: its allocation, and the tokens that its cells hold or will hold."""

    allocation: Allocation
    prompt: list[int]
    salt: str
    length: int


class CacheFuzzer:
    """Runs random operations and compares the cells with the tokens that they should hold."""

    def __init__(self, seed: int, kind: str) -> None:
        self.random = random = Random(f"{kind} {seed}")
        settings = dict(KINDS[kind])
        window = settings.pop("window", 0)
        unified = settings["unified"]
        sequences = random.choice([SLOTS + 1, 10]) if unified else SLOTS
        cells = random.choice([CELLS, 4 * CELLS]) if unified else CELLS
        self.context = ToyContext(cells=cells, sequences=sequences, rows=64, **settings)
        self.context.window = window
        self.context.shifts = self.context.divisible and not window
        chance = random.choice([0.0, 0.0, 0.1])
        self.context.lost = lambda: random.random() < chance
        self.context.damaged = lambda: bool(window) and random.random() < 0.3
        ram = random.choice([0, 1000, 100_000])
        self.offload = Offload(ram, whole=not self.context.divisible) if ram else None
        self.kv = KVCache(self.context, self.offload, random.choice([0, 16]))
        self.reported: set[tuple[BlockMedium, int]] = set()
        self.kv.report_changes(self.follow)
        self.running: list[RunningSequence] = []
        self.prefixes = [[random.randrange(1, VOCABULARY) for _ in range(CELLS)] for _ in range(3)]
        self.log: list[str] = []
        self.operations: list[Callable[[], None]] = [
            *[self.allocate] * 4,
            *[self.decode] * 8,
            *[self.load] * 4,
            *[self.release] * 2,
            self.evict,
            self.drop_idle,
            *[self.maintain] * 2,
            *[self.close_gap] * 2,
            self.save_at,
            self.price,
            self.move_elsewhere,
            self.erase,
        ]

    def run(self) -> None:
        for _ in range(OPERATIONS):
            operation = self.random.choice(self.operations)
            self.log.append(operation.__name__)
            operation()
            self.check()
        while self.running:
            self.release()
        self.kv.drop_idle()
        self.check()
        assert self.context.used() == 0
        self.maintain()
        assert not [medium for medium, _ in self.reported if medium == "cells"]

    def follow(self, changes: list[BlockChange]) -> None:
        """Applies reported changes to the mirror, in which no block is stored or removed twice."""
        for change in changes:
            held = change.medium, change.hash
            assert change.stored is (held not in self.reported), self.log
            self.reported ^= {held}

    def known_blocks(self) -> set[tuple[BlockMedium, int]]:
        """Returns the full blocks in cells and in RAM."""
        tree = self.kv._tree
        known: set[tuple[BlockMedium, int]] = set()
        for seq in tree._tails:
            key, tokens = root_key(tree.salt(seq)), tree.tokens(seq)
            for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
                key = key_of(key, tokens[start : start + BLOCK_TOKENS].tobytes())
                known.add(("cells", int(key[:16], 16)))
        for block in self.offload.tree.blocks() if self.offload is not None else ():
            if block.state is not None:
                path = [block] if self.context.divisible else block.path
                known |= {("ram", int(each.key[:16], 16)) for each in path if len(each.tokens) == BLOCK_TOKENS}
        return known

    def check(self) -> None:
        """Asserts that the cache is consistent and that each running sequence's cells hold its tokens."""
        self.kv.check()
        assert self.context.used() == self.kv.used_cells == self.kv.stats().used
        for each in self.running:
            assert self.kv.length(each.allocation.seq) == each.length
            assert self.held(each.allocation.seq) == each.prompt[: each.length], self.log
        assert len({each.allocation.seq for each in self.running}) == len(self.running)
        if self.offload is not None:
            for root in self.offload.tree._roots.values():
                self.check_blocks(root)

    def check_blocks(self, block: Block) -> None:
        """Asserts that the states of all blocks below `block` hold the tokens of the blocks."""
        for child in block.children.values():
            if child.state is not None:
                whole = not self.context.divisible
                tokens = child.prefix if whole else child.tokens
                assert child.state.view(np.int32).tolist() == [0 if whole else child.start, *tokens], self.log
            self.check_blocks(child)

    def held(self, seq: int) -> list[int]:
        """Returns the tokens in the cells of a sequence."""
        return [cell.token for _, cell in sorted(self.context.held[seq].items())]

    def draw(self) -> tuple[list[int], str]:
        """Returns a random prompt and its salt."""
        random = self.random
        prompt = random.choice(self.prefixes)[random.choice([0, 0, 0, 5]) : random.randint(1, CELLS - 30)]
        prompt += [random.randrange(1, VOCABULARY) for _ in range(random.randint(1, 5))]
        return prompt, random.choice(["", "", "tenant"])

    # ── operations ──

    def allocate(self) -> None:
        if len(self.running) == SLOTS:
            return
        prompt, salt = self.draw()
        match = self.kv.match(array("i", prompt), salt)
        assert self.kv.match(array("i", prompt), salt, match) is match
        assert match.idle_cells <= match.length < len(prompt)
        self.evict()  # may evict matched cells
        allocation = self.kv.allocate(match)
        self.running.append(RunningSequence(allocation, prompt, salt, allocation.cached))

    def decode(self) -> None:
        """Computes the next tokens of some sequences, with drafts that are partly rejected."""
        random, batch = self.random, self.context.batch
        free_rows = min(batch.capacity, self.kv.free_cells + self.kv.evictable_cells)
        batch.clear()
        parts: list[tuple[RunningSequence, list[int], list[int]]] = []
        for each in sorted(self.running, key=lambda each: each.allocation.seq):
            seq = each.allocation.seq
            if each.length == len(each.prompt) < CELLS - 8:
                each.prompt.append(random.randrange(1, VOCABULARY))
            ready = min(self.kv.ready(seq, len(each.prompt)), random.randint(1, 60), free_rows)
            if ready <= 0 or random.random() < 0.2:
                continue
            tokens, drafts = each.prompt[each.length : each.length + ready], list[int]()
            if self.context.partial and each.length + ready == len(each.prompt) < CELLS - 16:
                drafts = [
                    random.randrange(1, VOCABULARY) for _ in range(min(free_rows - ready, random.choice([0, 0, 3])))
                ]
            batch.add(seq, each.length, [*tokens, *drafts], 0)
            free_rows -= ready + len(drafts)
            parts.append((each, tokens, drafts))
        if not parts:
            return
        self.kv.evict(batch.rows)
        self.context.decode()
        self.kv.count_step()
        for each, tokens, drafts in parts:
            self.verify(each, tokens, drafts)

    def verify(self, each: RunningSequence, tokens: list[int], drafts: list[int]) -> None:
        """Commits the tokens and some of the draft tokens, and rolls the rest back."""
        seq = each.allocation.seq
        self.kv.commit(seq, tokens)
        each.length += len(tokens)
        if not drafts:
            return
        accepted = self.random.randint(0, len(drafts))
        self.kv.commit(seq, drafts[:accepted])
        each.prompt += drafts[:accepted]
        each.length += accepted
        if accepted < len(drafts) and not self.kv.rollback(seq):
            self.running.remove(each)
            self.kv.release(seq, keep=False)

    def load(self) -> None:
        for each in self.running:
            if self.kv.loading(each.allocation.seq):
                loaded = self.kv.load(each.allocation.seq, self.random.choice([0.0, 1e-3, 1.0]), wait=False)
                assert 0 <= loaded.moved <= loaded.tokens
                each.length += loaded.tokens

    def release(self) -> None:
        if self.running:
            each = self.running.pop(self.random.randrange(len(self.running)))
            self.kv.release(each.allocation.seq, keep=self.random.random() < 0.8)

    def evict(self) -> None:
        wanted = self.random.randint(0, CELLS)
        self.kv.evict(wanted)
        assert self.kv.free_cells >= wanted or not self.kv.evictable_cells

    def drop_idle(self) -> None:
        self.kv.drop_idle()
        assert self.kv.stats().idle == 0

    def maintain(self) -> None:
        self.kv.maintain(self.random.choice([0.0, 1e-4, 1e-2]))
        assert self.reported == self.known_blocks(), self.log

    def close_gap(self) -> None:
        if (moved := self.kv.close_gap()) is not None:
            each = next(each for each in self.running if each.allocation.seq == moved[0])
            each.allocation = Allocation(moved[1], each.length)

    def save_at(self) -> None:
        if self.running:
            each = self.random.choice(self.running)
            self.kv.save_at(each.allocation.seq, self.random.randint(1, len(each.prompt)))

    def price(self) -> None:
        draw = self.random.choice
        costs = Costs(compute=draw([0.0, 1e-6, 1.0]), resident=draw([0.0, 1.0]), extra_pass=draw([0.0, 1e-3, 1.0]))
        self.kv.set_costs(costs)

    def move_elsewhere(self) -> None:
        """Exports a sequence, and imports it under another salt."""
        prompt, salt = self.draw()
        parts: list[SequencePart] = []
        more, tokens = True, array("i", prompt)
        while more:
            found, more = self.kv.transfer.export(tokens, salt, parts[-1].end if parts else 0, 1.0)
            parts += found
        for part in parts:
            assert part.tokens == tokens[part.start : part.end]
        if parts and self.offload is not None:
            before = self.kv.transfer.known_length(tokens, "")
            self.kv.transfer.put(tokens[: parts[-1].end], "elsewhere", parts)
            assert self.kv.transfer.known_length(tokens, "") <= before, "other salts gain nothing"

    def erase(self) -> None:
        prompt, salt = self.draw()
        tokens = array("i", prompt)
        before = self.kv.transfer.known_length(tokens, salt)
        erased = self.kv.transfer.erase(tokens, salt)
        assert erased == before - self.kv.transfer.known_length(tokens, salt)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_random_operations(kind: str, seed: int) -> None:
    CacheFuzzer(seed, kind).run()


def test_there_are_ten_thousand_operations() -> None:
    assert len(KINDS) * SEEDS * OPERATIONS >= 10_000
