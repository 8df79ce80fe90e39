"""The queue of the embedding thread, in which the owners of requests take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from engine.backend import Embedding
from engine.fairness import TokenCounters


class EmbeddingJob:
    """The inputs of one request, of which the first `taken` are computed or being computed."""

    def __init__(
        self, inputs: Sequence[Sequence[int]], future: asyncio.Future[list[Embedding]], owner: str, weight: float
    ) -> None:
        self.inputs = inputs
        self.future = future
        self.owner = owner
        self.weight = weight
        self.taken = 0
        self.cancelled = False
        self.results: dict[int, Embedding] = {}


class PackedInput(NamedTuple):
    """One input of a job, by its number."""

    job: EmbeddingJob
    number: int

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids."""
        return self.job.inputs[self.number]


class EmbeddingQueue:
    """The jobs with inputs that are not taken yet. The owner with the smallest token counter is next (see
    `engine.fairness`); the jobs of an owner take turns."""

    def __init__(self) -> None:
        self._counters = TokenCounters()
        self._jobs: dict[str, deque[EmbeddingJob]] = {}  # by owner; no deque is empty

    def add(self, job: EmbeddingJob) -> None:
        """Adds a job."""
        self._counters.join(job.owner)
        self._jobs.setdefault(job.owner, deque()).append(job)

    def take(self, max_rows: int, max_inputs: int) -> list[PackedInput]:
        """Takes the inputs of the next decode, and drops jobs that are cancelled or have no further inputs.

        Takes at most `max_inputs` inputs with `max_rows` tokens in all, or a single longer input.
        """
        packed: list[PackedInput] = []
        rows = 0
        while len(packed) < max_inputs and (job := self._next()) is not None:
            length = len(job.inputs[job.taken])
            if packed and rows + length > max_rows:
                break
            packed.append(PackedInput(job, job.taken))
            rows += length
            job.taken += 1
            self._jobs[job.owner].rotate(-1)
            self._counters.charge(job.owner, length, job.weight)
        return packed

    def _next(self) -> EmbeddingJob | None:
        while self._jobs:
            owner = min(self._jobs, key=self._counters.__getitem__)
            jobs = self._jobs[owner]
            if not jobs[0].cancelled and jobs[0].taken < len(jobs[0].inputs):
                return jobs[0]
            jobs.popleft()
            if not jobs:
                del self._jobs[owner]
            self._counters.leave(owner)
        return None
