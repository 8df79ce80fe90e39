"""Runs `paceline` with its arguments, and measures where the CPU time of a token goes.

    python -m bench.parts OUT.json serve --sim ...

At the end OUT.json has the CPU seconds by part. A part is a function of the engine thread or the event loop, without
the parts that it calls; time outside of all parts is not counted. Reading the clocks adds about 20 us to a step.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from api.__main__ import main as paceline
from api.generation.completion_output import CompletionOutput
from api.generation.openai_replies import ReplyBuilder
from api.server.http_protocol import ChunkWriter
from engine.engine import Engine
from engine.outbox import Outbox
from engine.output_processor import OutputProcessor
from engine.pace import DraftChooser
from engine.running import Running
from engine.sim.context import SimContext
from engine.speculate import SequenceProposers
from engine.step import EngineCore
from engine.step_execution import StepExecution

# Functions by part.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "plan": [(EngineCore, "_admit"), (EngineCore, "_maintain"), (EngineCore, "_plan")],
    "batch": [(Running, "ordered"), (StepExecution, "_fill")],
    "model": [(SimContext, "decode")],
    "commit": [(StepExecution, "commit")],
    "pick": [(OutputProcessor, "_picks")],
    "verify": [(OutputProcessor, "process")],
    "learn": [(DraftChooser, "observe_step"), (SequenceProposers, "observe")],
    "draft": [(EngineCore, "_draft")],
    "flush": [(Outbox, "flush")],
    "other of the step": [(EngineCore, "step")],
    "deliver": [(Engine, "_deliver"), (CompletionOutput, "add")],
    "encode": [(each, "token_event") for each in ReplyBuilder.__subclasses__()],
    "send": [(ChunkWriter, "write")],
}


class PartClock:
    """CPU seconds by part, of all threads."""

    def __init__(self) -> None:
        self.seconds = Counter[str]()
        self._inner = threading.local()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a wrapper of `function` that adds its CPU time to `part`, without that of inner timed functions."""

        @functools.wraps(function)
        def measured(*arguments: Any, **named: Any) -> Any:
            outer, self._inner.seconds = getattr(self._inner, "seconds", 0.0), 0.0
            begun = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.thread_time() - begun
                self.seconds[part] += spent - self._inner.seconds
                self._inner.seconds = outer + spent

        return measured


def main() -> int:
    """Runs the command line of `paceline`, writes the seconds by part, and returns the exit code."""
    out, *arguments = sys.argv[1:]
    clock = PartClock()
    for part, functions in PARTS.items():
        for owner, name in functions:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
    try:
        return paceline(arguments)
    finally:
        Path(out).write_text(json.dumps(clock.seconds))


if __name__ == "__main__":
    sys.exit(main())
