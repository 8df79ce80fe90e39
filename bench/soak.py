"""Soak test over HTTP: thousands of requests with random hang-ups against one server.

Some requests are abandoned at a random time or after a random number of events. The table has the slope of the
server's resident memory after the first 2,000 requests, the lost requests, and each disagreement with `/metrics`. A
request is lost if its stream lacks exactly one terminal event (a finish reason, then `[DONE]`) and the client has not
closed it. The exit code is 1 if a request is lost or fails, a count disagrees, or the slope exceeds `--most-slope`.

`--sim` serves a model without weights, `-m` a real one. Stores with a bound are full before the slope is measured: the
prefix cache in RAM and the outputs of `suffix` are small, and `--fill` requests with long outputs come first. They fill
the n-grams that the proposers of all requests share: 16 MB of ngram-mod and 55 MB of ngram-cache. Further flags of the
server come after `--`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from msgspec import Struct, structs

from bench.client import ABANDONED, Outcome, run_closed_loop, stream
from bench.figures import save, show
from bench.models import SOURCES
from bench.server import Server, free_port, running, serving
from bench.workloads import COMPLETION_PATH, HttpRequest, random_text, story

# One request in REPEATED_EVERY has one of REPEATED_PROMPTS shared prompts.
REPEATED_EVERY, REPEATED_PROMPTS = 3, 40
# The delay of a hang-up is log-uniform between these bounds.
SHORTEST_HANG_UP_SECONDS, LONGEST_HANG_UP_SECONDS = 0.0005, 1.0
# Number of memory samples of a run.
SAMPLES = 200
# Number of requests before the first sample of the slope, or half of all requests if that is less.
UNMEASURED_REQUESTS = 2000
# Requests that fill the shared data of the proposers, and the tokens of each output. ngram-cache keeps 2^18 n-grams,
# and a token adds up to four; its table has its final size after 2^17 further ones.
FILL_REQUESTS, FILL_TOKENS = 220, 900
# Tokens of past outputs that `suffix` keeps.
SUFFIX_TOKENS = 10_000
# MiB of the prefix cache in RAM; the states of the model without weights take few bytes.
CACHE_RAM_MIB, SIM_CACHE_RAM_MIB = 64, 1


class PlannedRequest(Struct, frozen=True):
    """A request and its hang-up after `seconds` or after `events` events with output; never if both are `None`."""

    request: HttpRequest
    seconds: float | None = None
    events: int | None = None


class MemorySample(Struct, frozen=True):
    """The server's resident bytes after a number of ended requests."""

    ended: int
    resident: int


class Counts(Struct, frozen=True):
    """The server's counts at `/metrics`: requests by finish reason, requests in progress, tokens."""

    finished: dict[str, int]
    in_progress: int
    prompt_tokens: int
    completion_tokens: int

    def since(self, start: Counts) -> Counts:
        """Returns the counts since `start`, except `in_progress`, which stays as it is."""
        return structs.replace(
            self,
            finished={reason: count - start.finished.get(reason, 0) for reason, count in self.finished.items()},
            prompt_tokens=self.prompt_tokens - start.prompt_tokens,
            completion_tokens=self.completion_tokens - start.completion_tokens,
        )


class Summary(Struct, frozen=True):
    """The client's counts. Every request is complete, abandoned, failed (an error with a terminal event) or lost."""

    requests: int
    complete: int
    abandoned: int
    failed: int
    lost: int
    prompt_tokens: int
    completion_tokens: int


def plan_requests(number: int, tokens: int, hang_ups: float) -> list[PlannedRequest]:
    """Returns `number` requests, the same in every run; a fraction of `hang_ups` is abandoned."""
    rng = random.Random(number)
    requests: list[PlannedRequest] = []
    for index in range(number):
        prompt = rng.randrange(REPEATED_PROMPTS) if index % REPEATED_EVERY == 0 else REPEATED_PROMPTS + index
        length = rng.randint(1, tokens)
        if rng.random() < 0.5:
            request = story(prompt, length, words=8)
        else:
            body = {"prompt": random_text(prompt, 24), "max_tokens": length, "ignore_eos": True, "seed": index}
            request = HttpRequest(COMPLETION_PATH, body)
        if rng.random() >= hang_ups:
            requests.append(PlannedRequest(request))
        elif rng.random() < 0.5:
            requests.append(PlannedRequest(request, events=rng.randint(1, tokens)))
        else:
            spread = LONGEST_HANG_UP_SECONDS / SHORTEST_HANG_UP_SECONDS
            requests.append(PlannedRequest(request, seconds=SHORTEST_HANG_UP_SECONDS * spread ** rng.random()))
    return requests


async def send_planned(port: int, planned: PlannedRequest) -> Outcome:
    """Sends one request. A refused connection gives an outcome with status 0 and the error."""
    path, body = planned.request.path, planned.request.body
    try:
        return await stream(port, path, body, abandon_after=planned.seconds, max_arrivals=planned.events)
    except OSError as error:
        return Outcome(0.0, error=str(error))


def summary(outcomes: Sequence[Outcome]) -> Summary:
    """Returns the counts of the outcomes by kind."""
    kinds = [kind_of(outcome) for outcome in outcomes]
    complete = [outcome for outcome, kind in zip(outcomes, kinds, strict=True) if kind == "complete"]
    return Summary(
        requests=len(outcomes),
        prompt_tokens=sum(outcome.prompt_tokens for outcome in complete),
        completion_tokens=sum(outcome.completion_tokens for outcome in complete),
        **{kind: kinds.count(kind) for kind in ("complete", "abandoned", "failed", "lost")},
    )


def kind_of(outcome: Outcome) -> str:
    """Returns `complete`, `abandoned`, `failed` or `lost`.

    A request has failed if its only terminal event is an error: the body of a status other than 200, or an error event.
    """
    if outcome.error == ABANDONED:
        return "abandoned"
    terminal = (outcome.finish_reasons, outcome.done_markers)
    if outcome.status == 200 and not outcome.error:
        return "complete" if terminal == (1, 1) else "lost"
    return "failed" if outcome.error.startswith("{") and not outcome.finish_reasons else "lost"


def slope(samples: Sequence[MemorySample]) -> float:
    """Returns the slope, in bytes per request, of the least-squares line through the samples after the first
    `UNMEASURED_REQUESTS`, or after half of the requests if that is less; 0 for fewer than two such samples."""
    last = max((sample.ended for sample in samples), default=0)
    late = [sample for sample in samples if sample.ended >= min(UNMEASURED_REQUESTS, last / 2)]
    x = sum(sample.ended for sample in late) / max(1, len(late))
    y = sum(sample.resident for sample in late) / max(1, len(late))
    spread = sum((sample.ended - x) ** 2 for sample in late)
    return sum((sample.ended - x) * (sample.resident - y) for sample in late) / spread if spread else 0.0


def disagreements(client: Summary, server: Counts) -> list[str]:
    """Returns a sentence for each way in which the server's counts contradict the client's.

    An abandoned request may be cancelled, may be finished before the server notices the hang-up, or may never reach the
    engine; it counts at most once.
    """
    finished = sum(count for reason, count in server.finished.items() if reason in ("stop", "length"))
    total, cancelled = sum(server.finished.values()), server.finished.get("cancelled", 0)
    max_finished = client.complete + client.abandoned
    contradictions = {
        f"{server.in_progress} requests are still in progress": server.in_progress != 0,
        f"{finished} requests finished, {client.complete} to {max_finished} expected": not client.complete
        <= finished
        <= max_finished,
        f"{cancelled} requests cancelled, at most {client.abandoned} expected": cancelled > client.abandoned,
        f"{total} requests ended, at most {client.requests} were sent": total > client.requests,
        f"{total - finished - cancelled} requests ended otherwise": total - finished - cancelled > client.failed,
        f"{server.prompt_tokens} prompt tokens, at least {client.prompt_tokens} expected": (
            server.prompt_tokens < client.prompt_tokens
        ),
        f"{server.completion_tokens} completion tokens, at least {client.completion_tokens} expected": (
            server.completion_tokens < client.completion_tokens
        ),
    }
    return [sentence for sentence, wrong in contradictions.items() if wrong]


# ── the server from outside ──


def open_files(server: Server) -> int:
    """Returns the number of the server's open file descriptors."""
    return sum(1 for _ in Path(f"/proc/{server.pid}/fd").iterdir())


def num_threads(server: Server) -> int:
    """Returns the number of the server's threads, among them pools that grow to a fixed size."""
    return sum(1 for _ in Path(f"/proc/{server.pid}/task").iterdir())


def counts_of(text: str) -> Counts:
    """Returns the counts in the text of `/metrics`. Raises KeyError if a count is missing."""
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    begin = 'paceline_requests_total{reason="'
    return Counts(
        finished={name[len(begin) : -2]: int(float(value)) for name, value in values.items() if name.startswith(begin)},
        in_progress=int(float(values["paceline_requests_running"]) + float(values["paceline_requests_waiting"])),
        prompt_tokens=int(float(values["paceline_prompt_tokens_total"])),
        completion_tokens=int(float(values["paceline_completion_tokens_total"])),
    )


def settled_counts(server: Server, seconds: float = 30.0) -> Counts:
    """Returns the counts as soon as no request is in progress, or after `seconds`."""
    until = time.monotonic() + seconds
    while (counts := counts_of(server.metrics())).in_progress and time.monotonic() < until:
        time.sleep(0.1)
    return counts


@contextmanager
def served(options: argparse.Namespace) -> Iterator[Server]:
    """Runs the server for the length of the block."""
    ram = options.cache_ram if options.cache_ram >= 0 else SIM_CACHE_RAM_MIB if options.sim else CACHE_RAM_MIB
    size = ["-np", str(options.slots), "-c", str(1024 * options.slots), "-cram", str(ram)]
    size += ["--spec-suffix-tokens", str(SUFFIX_TOKENS), *options.more]
    if not options.sim:
        with serving(options.model, size) as server:
            yield server
        return
    port = free_port()
    command = [sys.executable, "-m", "api", "serve", "--sim", "--sim-cost", "free", "--port", str(port), *size]
    with running(command, port, 60) as server:
        yield server


async def fill(server: Server, options: argparse.Namespace) -> None:
    """Sends the requests that fill the shared data of the proposers."""

    async def send(number: int) -> Outcome:
        body = {"prompt": random_text(-1 - number, 24), "max_tokens": FILL_TOKENS, "ignore_eos": True, "seed": number}
        return await stream(server.port, COMPLETION_PATH, body)

    await run_closed_loop(options.clients, range(options.fill), send)


async def send_all(server: Server, options: argparse.Namespace, samples: list[MemorySample]) -> list[Outcome]:
    """Sends all requests and adds samples of the resident memory to `samples`."""
    every, ended = max(1, options.requests // SAMPLES), 0

    async def send(planned: PlannedRequest) -> Outcome:
        nonlocal ended
        outcome = await send_planned(server.port, planned)
        ended += 1
        if ended % every == 0:
            samples.append(MemorySample(ended, server.resident_bytes(peak=False)))
        return outcome

    return await run_closed_loop(
        options.clients, plan_requests(options.requests, options.tokens, options.hang_ups), send
    )


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the soak test and returns its figures. Raises RuntimeError if the server does not start."""
    samples: list[MemorySample] = []
    with served(options) as server, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(fill(server, options))
        before, files, threads = settled_counts(server), open_files(server), num_threads(server)
        begun = time.perf_counter()
        outcomes = runner.run(send_all(server, options, samples))
        seconds = time.perf_counter() - begun
        counts = settled_counts(server).since(before)
        files_after, threads_after = open_files(server), num_threads(server)
    client = summary(outcomes)
    return {
        **structs.asdict(client),
        "seconds": seconds,
        "resident_mib_at_half": samples[len(samples) // 2].resident / 2**20 if samples else 0.0,
        "resident_mib_at_end": samples[-1].resident / 2**20 if samples else 0.0,
        "slope_bytes_per_request": slope(samples),
        "open_files_more_than_before": files_after - files,
        "threads_more_than_before": threads_after - threads,
        "server_finished": counts.finished,
        "disagreements": disagreements(client, counts),
        "samples": [(sample.ended, sample.resident) for sample in samples],
    }


def main() -> None:
    """Prints a table, writes `soak.json` and exits with 1 if the server fails the test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["smollm2"].path, help="GGUF file")
    parser.add_argument("--sim", action="store_true", help="serve a model without weights")
    parser.add_argument("--requests", type=int, default=5000, help="requests in all")
    parser.add_argument("--clients", type=int, default=32, help="concurrent clients")
    parser.add_argument("--slots", type=int, default=16, help="-np of the server, with 1024 tokens of context each")
    parser.add_argument("--tokens", type=int, default=8, help="maximum tokens of an answer")
    parser.add_argument("--hang-ups", type=float, default=0.4, help="fraction of the requests that is abandoned")
    parser.add_argument("--fill", type=int, default=FILL_REQUESTS, help="requests with long outputs before the others")
    parser.add_argument("--cache-ram", type=int, default=-1, help="MiB; -1 is 64, or 1 with --sim")
    parser.add_argument(
        "--most-slope", type=float, default=1024.0, help="maximum growth of the resident memory, in bytes per request"
    )
    parser.add_argument("more", nargs="*", help="further flags of the server, after --")
    options = parser.parse_args()
    try:
        figures = soak(options)
    except RuntimeError as error:
        raise SystemExit(f"\n{error}") from None
    shown = {name: value for name, value in figures.items() if name != "samples"}
    show("soak test", ["", ""], [[name.replace("_", " "), value] for name, value in shown.items()])
    save("soak_sim" if options.sim else f"soak_{options.model.stem}", figures)
    if figures["lost"] or figures["failed"] or figures["disagreements"]:
        sys.exit("Requests are lost or failed, or the counts disagree.")
    if figures["slope_bytes_per_request"] > options.most_slope:
        sys.exit(f"The resident memory grows by more than {options.most_slope:.0f} bytes per request.")


if __name__ == "__main__":
    main()
