"""Measures the acceptance of a draft model at a temperature, with shared, with independent and without noise.

The outputs of the target are recorded at a temperature, with a seed for each request. The draft model is then replayed
over the recorded outputs and samples its tokens in each mode of `--draft-noise`.
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
from bench.outputs import SLOTS, RecordedRequest, answer, questions
from bench.proposers import EagerDraftSequence, ReplayCounts, replay
from engine import open_vocabulary
from engine.backend import Vocab
from engine.config import EngineConfig
from engine.contract import Request, SamplingParams
from engine.engine import Engine
from engine.llama import open_gguf
from engine.sampling import Sampler
from engine.speculate import DraftModel
from engine.speculate.sampled_draft import PickToken

_COLUMNS = ("workload", "temperature", "noise", "drafts", "tokens", "accepted", "per step", "first right")
NOISE_MODES = ("shared", "greedy", "off")


def sampling(temperature: float, seed: int) -> SamplingParams:
    """Returns the sampling parameters of target and draft model: default truncation and a temperature."""
    return SamplingParams(temperature=temperature, seed=seed)


async def outputs_at(
    model: Path, workload: str, temperature: float, options: argparse.Namespace
) -> list[RecordedRequest]:
    """Returns the target's outputs for a workload; the seed of a request is its index."""
    config = EngineConfig.of(path=model, slots=SLOTS, context=SLOTS * 1024, speculation={"types": ["none"]})
    async with Engine.open(config) as engine:
        sent = enumerate(questions(workload, options.requests))
        calls = (answer(engine, question, options.tokens, sampling(temperature, seed)) for seed, question in sent)
        return list(await asyncio.gather(*calls))


def pick_of(noise: str, vocab: Vocab, case: RecordedRequest, params: SamplingParams) -> PickToken | None:
    """Returns the function that samples draft tokens in one request. `None` means greedy."""
    if noise == "greedy":
        return None
    sampler = Sampler(Request(prompt=case.prompt, sampling=params), params.seed or 0, vocab.ends, vocab.piece)
    own = sampler if noise == "shared" else sampler.for_drafts(independent=True)
    return lambda row, history, discarded: own.pick(row, history, len(case.prompt), discarded)


def draft_sequence(
    model: DraftModel,
    vocab: Vocab,
    noise: str,
    temperature: float,
    cases: Sequence[RecordedRequest],
    case: RecordedRequest,
) -> EagerDraftSequence:
    """Returns the draft-model sequence of a case; the seed is the index of the case."""
    return EagerDraftSequence(model, 4, case, pick_of(noise, vocab, case, sampling(temperature, cases.index(case))))


def row(count: ReplayCounts) -> list[object]:
    """Returns the counts under `_COLUMNS`; `first right` is the fraction of drafts with an accepted first token."""
    return [*count.row()[:4], f"{count.first_accepted / max(1, count.drafts):.3f}"]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, default=SOURCES["qwen-target"].path, help="GGUF file of the target")
    parser.add_argument(
        "-md", "--model-draft", type=Path, default=SOURCES["qwen-draft"].path, help="GGUF file of the draft model"
    )
    parser.add_argument("--requests", type=int, default=8, help="requests of each workload")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    options = parser.parse_args()
    rows: list[list[object]] = []
    with (
        open_vocabulary(options.model) as vocab,
        closing(open_gguf(draft_model_config(options.model_draft), lambda share: None, lambda: True)) as backend,
    ):
        model = DraftModel(backend, vocab.size)
        for workload in ("chat", "completion"):
            for temperature in (0.7, 1.0):
                cases = asyncio.run(outputs_at(options.model, workload, temperature, options))
                for noise in NOISE_MODES:
                    count = replay(
                        partial(draft_sequence, model, vocab, noise, temperature, cases), cases, options.tokens
                    )
                    rows.append([workload, temperature, noise, *row(count)])
    show("acceptance of draft tokens", _COLUMNS, rows)
    save("noise", rows)


def draft_model_config(path: Path) -> EngineConfig:
    """Returns the configuration of the draft model's engine."""
    return EngineConfig.of(path=path, slots=1, context=4096)


if __name__ == "__main__":
    main()
