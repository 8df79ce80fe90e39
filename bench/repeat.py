"""Repeatability over HTTP: the same request, greedy or seeded, must give the same tokens in every situation.

Each request is sent to a server with default flags: alone without cached tokens, alone with cached tokens, and with 8
other clients, without and with cached tokens; all of this for each number of slots (`--slots 1 8`). Half of the other
clients send predictions of their own answers, so that the same steps verify accepted drafts. The first answer of the
first server is the reference. The exit code is 1 if the tokens or the text of any answer differ from the reference.

`--server llama-server-split` measures a mode of llama-server instead. Further flags of the server come after `--`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench.client import Outcome, chat, stream, user
from bench.figures import save, show
from bench.models import SOURCES, SetupError
from bench.peers import MODES, PACELINE, TUNED, Settings, llama_server
from bench.server import Server, serving
from bench.workloads import CHAT_PATH, random_text
from engine.config import physical_cores

# Tokens of the other clients' prompts and answers.
OTHER_PROMPT_TOKENS, OTHER_TOKENS = 120, 40

PROMPTS = {
    "story": "Tell a story about a lighthouse keeper who writes down every ship that passes in the night.",
    "list": "Write the same line ten times: The keeper of the lighthouse wrote down every ship that passed.",
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "top_p": 0.95, "seed": 7},
}


class RepeatedAnswer(Struct, frozen=True):
    """One answer, with the numbers of cached prompt tokens and of accepted draft tokens."""

    tokens: tuple[bytes, ...]
    logprobs: tuple[float, ...]
    text: str
    cached: int
    accepted: int

    @classmethod
    def of(cls, outcome: Outcome) -> RepeatedAnswer:
        """Returns the answer of a request. Raises RuntimeError if the request failed."""
        if outcome.failed:
            raise RuntimeError(f"a request failed ({outcome.status}): {outcome.error}")
        counts = outcome.cached_tokens, outcome.accepted_tokens
        return cls(tuple(outcome.tokens), tuple(outcome.logprobs), outcome.text, *counts)


class Situation(Struct, frozen=True):
    """A situation in which a request is sent `times` times: with or without cached tokens and other clients."""

    name: str
    times: int
    cached: bool
    with_others: bool


class Comparison(Struct, frozen=True):
    """The answers of one request in one situation, compared with the reference.

    `differs_at` is the first position with a differing token in any answer; `None` means that all answers are equal.
    `same_bits` counts the answers whose log probabilities are also equal. `others_accepted` are the accepted draft
    tokens of the other clients.
    """

    request: str
    slots: int
    situation: str
    answers: int
    same: int
    differs_at: int | None
    same_bits: int
    cached: int
    accepted: int
    others_accepted: int

    def row(self) -> list[object]:
        """Returns the row under `_COLUMNS`."""
        position = "" if self.differs_at is None else self.differs_at
        counts = [self.cached, self.accepted, self.others_accepted]
        return [self.request, self.slots, self.situation, self.answers, self.same, position, self.same_bits, *counts]


_COLUMNS = (
    *("request", "slots", "situation", "answers", "same", "differs at", "bits"),
    *("cached", "accepted", "others'"),
)


def situations(times: int) -> list[Situation]:
    """Returns the situations in the order in which they are measured."""
    half = max(1, times // 2)
    return [
        Situation("alone", times, cached=False, with_others=False),
        Situation("cache", times, cached=True, with_others=False),
        Situation("company", half, cached=False, with_others=True),
        Situation("company+cache", half, cached=True, with_others=True),
    ]


def first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Returns the first differing position; the end of the shorter sequence counts. `None` means equal sequences."""
    for position, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return position
    return None if len(one) == len(other) else min(len(one), len(other))


def differs_at(reference: RepeatedAnswer, answer: RepeatedAnswer) -> int | None:
    """Returns the position of the first differing token; the number of tokens if only the text differs.

    `None` means that tokens and text are equal.
    """
    position = first_difference(reference.tokens, answer.tokens)
    return len(answer.tokens) if position is None and reference.text != answer.text else position


def compared(
    request: str,
    slots: int,
    situation: Situation,
    reference: RepeatedAnswer,
    answers: Sequence[RepeatedAnswer],
    others: int,
) -> Comparison:
    """Returns the comparison of the answers with the reference."""
    positions = [differs_at(reference, answer) for answer in answers]
    return Comparison(
        request=request,
        slots=slots,
        situation=situation.name,
        answers=len(answers),
        same=positions.count(None),
        differs_at=min((position for position in positions if position is not None), default=None),
        same_bits=sum(
            position is None and answer.logprobs == reference.logprobs
            for position, answer in zip(positions, answers, strict=True)
        ),
        cached=sum(answer.cached for answer in answers),
        accepted=sum(answer.accepted for answer in answers),
        others_accepted=others,
    )


def requests(tokens: int) -> dict[str, dict[str, Any]]:
    """Returns the bodies of the measured requests by name."""
    return {
        f"{sampling} {name}": chat(user(prompt), tokens, logprobs=True, **parameters)
        for sampling, parameters in SAMPLING.items()
        for name, prompt in PROMPTS.items()
    }


# ── the other clients ──


class OtherClients:
    """Other clients; each sends one request after the other until it is cancelled.

    Clients of even numbers send distinct prompts. Clients of odd numbers send each prompt twice, the second time with
    the first answer as the prediction, so that drafts are accepted.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = count()
        self.running = asyncio.Event()
        self.accepted = 0

    async def client(self, number: int) -> None:
        """Sends requests without end. Raises RuntimeError if a request fails."""
        while True:
            body = chat(user(random_text(next(self._numbers), OTHER_PROMPT_TOKENS)), OTHER_TOKENS, seed=number)
            text = await self._send(body)
            if number % 2:
                await self._send({**body, "prediction": {"type": "content", "content": text}})

    async def _send(self, body: dict[str, Any]) -> str:
        outcome = await stream(self._port, CHAT_PATH, body)
        if outcome.failed:
            raise RuntimeError(f"a request of another client failed ({outcome.status}): {outcome.error}")
        self.running.set()
        self.accepted += outcome.accepted_tokens
        return outcome.text


@asynccontextmanager
async def other_clients(port: int, clients: int) -> AsyncIterator[OtherClients]:
    """Runs `clients` other clients for the length of the block, which begins after their first complete answer.

    Raises RuntimeError, also within the block, if a request of the other clients fails.
    """
    others = OtherClients(port)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(others.client(number)) for number in range(clients)]
            if clients:
                await others.running.wait()
            yield others
            for task in tasks:
                task.cancel()
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


# ── the measurement ──


class CacheSalts:
    """A source of new cache salts for requests that must not reuse cached tokens."""

    def __init__(self) -> None:
        self._numbers = count()

    def salted(self, body: dict[str, Any], *, cached: bool) -> dict[str, Any]:
        """Returns the body with a new salt, and with `cache_prompt` off for llama-server; unchanged if `cached`."""
        return body if cached else {**body, "cache_salt": f"repeat {next(self._numbers)}", "cache_prompt": False}


async def answers(
    server: Server, situation: Situation, body: dict[str, Any], salts: CacheSalts
) -> list[RepeatedAnswer]:
    """Returns the answers of one request in a situation. Raises RuntimeError if the request fails."""
    received: list[RepeatedAnswer] = []
    for _ in range(situation.times):
        sent = salts.salted(body, cached=situation.cached)
        received.append(RepeatedAnswer.of(await stream(server.port, CHAT_PATH, sent)))
    return received


async def measured(
    server: Server, slots: int, options: argparse.Namespace, references: dict[str, RepeatedAnswer]
) -> list[Comparison]:
    """Returns the comparisons of one server; stores the first answer of each request in `references`."""
    comparisons: list[Comparison] = []
    salts = CacheSalts()
    for situation in situations(options.times):
        async with other_clients(server.port, options.others if situation.with_others else 0) as others:
            for name, body in requests(options.tokens).items():
                accepted = others.accepted
                received = await answers(server, situation, body, salts)
                reference = references.setdefault(name, received[0])
                comparisons.append(compared(name, slots, situation, reference, received, others.accepted - accepted))
                print(*comparisons[-1].row(), flush=True)
    return comparisons


def server_of(options: argparse.Namespace, slots: int) -> AbstractContextManager[Server]:
    """Returns a context manager that runs the measured server."""
    if options.server != PACELINE:
        context = options.context or 2048 * slots
        settings = Settings(options.model, context, slots, physical_cores())
        return llama_server(settings, [*(MODES | TUNED)[options.server], *options.more])
    flags = ["-np", str(slots), *(["-c", str(options.context)] if options.context else []), *options.more]
    return serving(options.model, flags)


def run(options: argparse.Namespace) -> Iterator[Comparison]:
    """Yields the comparisons of all servers. Raises RuntimeError if a server does not start or a request fails."""
    references: dict[str, RepeatedAnswer] = {}
    for slots in options.slots:
        with server_of(options, slots) as server:
            yield from asyncio.run(measured(server, slots, options, references))


def main() -> None:
    """Prints a table, writes it as JSON and exits with 1 if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8], help="-np of each server, one after the other")
    parser.add_argument("-c", "--context", type=int, default=0, help="-c of the server; 0 is the default")
    parser.add_argument(
        "--times", type=int, default=4, help="answers to each request without other clients; half as many with them"
    )
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each answer")
    parser.add_argument("--others", type=int, default=8, help="number of other clients")
    parser.add_argument("--server", choices=[PACELINE, *MODES, *TUNED], default=PACELINE, help="the server measured")
    parser.add_argument("more", nargs="*", help="further flags of the server, after --")
    options = parser.parse_args()
    try:
        comparisons = list(run(options))
    except (SetupError, RuntimeError) as error:
        raise SystemExit(f"\n{error}") from None
    title = f"the same request in different situations, {options.server}, {options.model.stem}"
    show(title, _COLUMNS, [one.row() for one in comparisons])
    save(f"repeat_{options.server}_{options.model.stem}", comparisons)
    if num_different := sum(one.answers - one.same for one in comparisons):
        sys.exit(f"{num_different} of {sum(one.answers for one in comparisons)} answers differ from the first one.")


if __name__ == "__main__":
    main()
