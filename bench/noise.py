"""How often a draft model agrees with its target when both are sampled: with shared noise, greedily, independently.

The target says what it says at some temperature, each request with a seed of its own; the draft model is then replayed
over that, picking its tokens in each of the ways that `--draft-noise` knows.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from bench.figures import save, show
from bench.models import SOURCES
from bench.proposers import SLOTS, Asked, Case, Count, answer, questions, replay
from engine.backend import Vocab
from engine.config import EngineConfig
from engine.contract import Request, SamplingParams
from engine.engine import Engine, open_vocabulary
from engine.llama import open_gguf
from engine.sampling import Sampler
from engine.speculate import DraftModel
from engine.speculate.draft import Pick

COLUMNS = ("workload", "temperature", "noise", "drafts", "tokens", "accepted", "per step", "first right")
NOISES = ("shared", "greedy", "off")


def law(temperature: float, seed: int) -> SamplingParams:
    """How both are sampled: llama-server's truncation, at a temperature."""
    return SamplingParams(temperature=temperature, seed=seed)


async def said_at(model: Path, workload: str, temperature: float, options: argparse.Namespace) -> list[Case]:
    """What the target says to the requests of a workload, request i with seed i."""
    config = EngineConfig.of(path=model, slots=SLOTS, context=SLOTS * 1024, speculation={"types": ["none"]})
    async with Engine.open(config) as engine:
        asked = questions(workload, options.requests)
        calls = (answer(engine, one, options.tokens, law(temperature, seed)) for seed, one in enumerate(asked))
        return list(await asyncio.gather(*calls))


def pick_of(noise: str, vocab: Vocab, case: Case, params: SamplingParams) -> Pick | None:
    """How the draft model picks in one request."""
    if noise == "greedy":
        return None
    sampler = Sampler(Request(prompt=case.prompt, sampling=params), params.seed or 0, vocab.ends, vocab.piece)
    own = sampler if noise == "shared" else sampler.apart()
    return lambda row, history, forgotten: own.pick(row, history, len(case.prompt), forgotten)


def seat(model: DraftModel, vocab: Vocab, noise: str, temperature: float, cases: Sequence[Case], case: Case) -> Asked:
    """The seat of a case, whose place among `cases` is its seed."""
    return Asked(model, 4, case, pick_of(noise, vocab, case, law(temperature, cases.index(case))))


def row(count: Count) -> list[object]:
    """Drafts, tokens and accepted ones of each, accepted per step, and the share of drafts that began rightly."""
    return [*count.row()[:4], f"{count.begun / max(1, count.drafts):.3f}"]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["qwen-target"].path, help="GGUF file of the target")
    parser.add_argument(
        "-md", "--model-draft", type=Path, default=SOURCES["qwen-draft"].path, help="of the draft model"
    )
    parser.add_argument("--requests", type=int, default=8, help="of each workload")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    options = parser.parse_args()
    rows: list[list[object]] = []
    with (
        open_vocabulary(options.model) as vocab,
        closing(open_gguf(drafts_alone(options.model_draft), lambda share: None, lambda: True)) as backend,
    ):
        model = DraftModel(backend, vocab.size)
        for workload in ("chat", "completion"):
            for temperature in (0.7, 1.0):
                cases = asyncio.run(said_at(options.model, workload, temperature, options))
                for noise in NOISES:
                    count = replay(partial(seat, model, vocab, noise, temperature, cases), cases, options.tokens)
                    rows.append([workload, temperature, noise, *row(count)])
    show("draft tokens that the target picked too", COLUMNS, rows)
    save("noise", rows)


def drafts_alone(path: Path) -> EngineConfig:
    """How the draft model is opened."""
    return EngineConfig.of(path=path, slots=1, context=4096)


if __name__ == "__main__":
    main()
