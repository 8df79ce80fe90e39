"""An engine core whose outputs an `Engine` delivers to generations, without a thread."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, NamedTuple

from msgspec import structs

from engine.commands import Cancel, Submit
from engine.config import EngineConfig
from engine.contract import EngineFault, Finished, Request, Tokens
from engine.engine import Engine
from engine.generation import Generation
from engine.outbox import StepOutput
from tests.engine.test_grammar_exact import pair_backend
from tests.engine.test_same_as_alone import CoreBench, Oracle


class Delivery(NamedTuple):
    """What the consumer of a request got."""

    ids: list[int]
    text: str
    end: Finished | None
    error: EngineFault | None


class DeliveringBench(CoreBench):
    """A bench whose outputs an `Engine` delivers to generations, and which executes the engine's commands."""

    def __init__(self, context: Any, *, offloaded: bool, **settings: Any) -> None:
        """With `offloaded`, masks are computed on a thread, as for a model on a GPU."""
        backend = pair_backend(context)
        backend.info = structs.replace(backend.info, offloaded=offloaded)
        super().__init__(context, backend=backend, **settings)
        self._runner = asyncio.Runner()
        self.generations: dict[int, Generation] = {}
        self._commands: deque[Submit | Cancel] = deque()
        self.engine: Any = self._runner.run(self._open())

    async def _open(self) -> Any:
        config = EngineConfig.of(path="toy.gguf", slots=4, queue=20)
        engine: Any = Engine(config)
        engine._core = self
        return engine

    def put(self, command: Submit | Cancel) -> None:
        """Receives a command of the engine."""
        self._commands.append(command)

    def deliver(self, items: list[StepOutput]) -> None:
        super().deliver(items)
        self.engine._deliver(items)

    def enter(self, request: Request, oracle: Oracle) -> int:
        """Submits a request by its generation. Returns its key."""
        self.execute()
        generation = Generation(request, self.backend.vocab.piece, self.engine._submit, self.engine._cancel)
        self._runner.run(generation.__aenter__())
        key = self._commands.popleft().key
        self.generations[key] = generation
        self.submit(key, request, oracle)
        return key

    def execute(self) -> None:
        """Executes the commands of the engine, which cancel requests."""
        while self._commands:
            command = self._commands.popleft()
            assert isinstance(command, Cancel)
            self.core.lifecycle.end(command.key, command.reason)

    def step(self) -> None:
        """Runs one step after the commands."""
        self.execute()
        self.core.step()
        self.check()

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.core.lifecycle.busy:
                break
            self.step()
        super().run(max_steps)

    def received(self, key: int) -> Delivery:
        """Returns what the generation of a request yields. Asserts that its last update is the only terminal one."""
        return self._runner.run(self._received(self.generations[key]))

    async def _received(self, generation: Generation) -> Delivery:
        updates: list[Tokens | Finished] = []
        error = None
        try:
            updates = [update async for update in generation]
        except EngineFault as fault:
            error = fault
        assert [update async for update in generation] == [], "nothing follows the terminal update"
        tokens = [update for update in updates if isinstance(update, Tokens)]
        ends = [update for update in updates if isinstance(update, Finished)]
        assert len(ends) == (error is None)
        ids = [id for update in tokens for id in update.ids]
        return Delivery(ids, "".join(update.text for update in tokens), next(iter(ends), None), error)

    def close(self) -> None:
        """Closes the core, the encoder, and the event loop."""
        self.core.close()
        super().close()
        self._runner.close()
