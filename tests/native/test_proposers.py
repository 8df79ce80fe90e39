"""Proposers on the first layers of the real model do not change the output; an unsuitable draft model is reported."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import pytest
from msgspec import structs

from engine import Engine, EngineConfig, Finished, Request, RequestRefused, SamplingParams, Speculation
from tests.native.cut import cut
from tests.native.test_engine import answer

EXACT = {"deterministic": True, "flash_attention": "on"}
LIST = "Count: one, two, three, four. one, two, three, four. one, two, three, four. one, two,"
TEXTS = (LIST, "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return", "Once upon a time", LIST + " three")


def config(model: Path, **speculation: object) -> EngineConfig:
    """Returns a configuration in which a row does not depend on its batch, and every draft is verified."""
    draft = speculation.pop("draft", {})
    speculation = {"order": "fixed", **speculation}
    return EngineConfig.of(path=model, slots=4, context=2048, speculation=speculation, draft=draft, **EXACT)  # type: ignore[arg-type]


def request(engine: Engine, text: str, temperature: float = 0.0) -> Request:
    prompt = tuple(engine.vocab.tokenize(text, special=True))
    sampling = SamplingParams(temperature=temperature, seed=len(text))
    return Request(prompt=prompt, max_tokens=24, ignore_eos=True, sampling=sampling, prediction=prompt)


async def generate_all(engine: Engine, temperature: float) -> tuple[list[list[int]], list[Finished]]:
    """Returns the outputs for all `TEXTS`, generated concurrently."""
    got = await asyncio.gather(*(answer(engine, request(engine, text, temperature)) for text in TEXTS))
    return [ids for ids, _ in got], [end for _, end in got]


@pytest.fixture(scope="module")
def plain(short_model: Path) -> dict[float, list[list[int]]]:
    """Returns the outputs without speculation, by temperature."""

    async def alone() -> dict[float, list[list[int]]]:
        async with Engine.open(config(short_model, types=["none"])) as engine:
            return {
                temperature: [
                    (await answer(engine, _without(request(engine, text, temperature), Speculation())))[0]
                    for text in TEXTS
                ]
                for temperature in (0.0, 0.8)
            }

    return asyncio.run(alone())


def _without(wanted: Request, speculation: Speculation) -> Request:
    return structs.replace(wanted, speculation=speculation)


@pytest.fixture(scope="module")
def first_layers(short_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of the model cut to its first two layers."""
    return cut(short_model, tmp_path_factory.mktemp("models") / "first-layers.gguf", 2)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_draftless_types_keep_the_output(
    short_model: Path, temperature: float, plain: dict[float, list[list[int]]]
) -> None:
    speculation = {"types": ["auto"], "size_n": 3, "size_m": 8, "mod_match": 3, "mod_min": 0}
    async with Engine.open(config(short_model, **speculation)) as engine:
        ids, ends = await generate_all(engine, temperature)
        assert ids == plain[temperature]
        assert sum(end.usage.drafted for end in ends) > 0
        if not temperature:
            assert sum(end.usage.accepted for end in ends) > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_the_model_as_its_own_draft(
    short_model: Path, temperature: float, plain: dict[float, list[list[int]]]
) -> None:
    draft = {"path": str(short_model), "n_max": 5, "cache_type_v": "bf16"}
    async with Engine.open(config(short_model, types=["draft"], draft=draft)) as engine:
        ids, ends = await generate_all(engine, temperature)
        assert ids == plain[temperature]
        model_drafts = [drafts for end in ends for drafts in end.drafts if drafts.type == "draft"]
        drafted, accepted = (
            sum(drafts.drafted for drafts in model_drafts),
            sum(drafts.accepted for drafts in model_drafts),
        )
        assert drafted > 8
        assert 0.9 * drafted < accepted, "also when sampled, as target and draft model have the same noise"


async def test_a_bad_draft_model_keeps_the_output(
    short_model: Path, first_layers: Path, plain: dict[float, list[list[int]]]
) -> None:
    async with Engine.open(
        config(short_model, types=["draft"], draft={"path": str(first_layers), "n_max": 4, "context": 512})
    ) as engine:
        ids, ends = await generate_all(engine, 0.0)
        assert ids == plain[0.0]
        assert sum(end.usage.accepted for end in ends) < sum(end.usage.drafted for end in ends)


async def test_a_draft_model_with_another_vocabulary_is_logged_and_not_used(
    short_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = cut(short_model, tmp_path / "other.gguf", 1, {1000: "no-such-word", 2000: "nor-this-one"})
    caplog.set_level(logging.WARNING, "paceline.speculation")
    async with Engine.open(config(short_model, types=["auto"], draft={"path": str(other)})) as engine:
        assert "draft" not in engine.proposers
        reason = engine.unavailable_proposers["draft"]
        assert f"{other} does not fit the model: its token 1000 is 'no-such-word', the model's is " in reason
        assert reason in caplog.text
        refused = _without(request(engine, LIST), Speculation(type=("draft",)))
        with pytest.raises(RequestRefused, match="token 1000"):
            engine.generate(refused)
        assert (await answer(engine, request(engine, LIST)))[1].usage.completion == 24


async def test_shared_data_outlives_the_engine(short_model: Path, tmp_path: Path) -> None:
    files = {"pool_file": str(tmp_path / "pool"), "lookup_dynamic": str(tmp_path / "counts")}
    speculation = {"types": ["ngram-mod", "ngram-cache"], "mod_match": 4, "mod_min": 0, **files}
    for _ in range(2):
        async with Engine.open(config(short_model, **speculation)) as engine:
            ids, end = await answer(engine, request(engine, "Once upon a time"))
    mod = next(drafts for drafts in end.drafts if drafts.type == "ngram-mod")
    assert len(ids) == 24
    assert mod.accepted >= 10, "the second engine drafts from the outputs of the first"


async def test_the_lines_in_the_log(short_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paceline.speculation")
    async with Engine.open(config(short_model, types=["ngram-simple", "ngram-mod"], size_n=2, size_m=4)) as engine:
        one_token = structs.replace(request(engine, LIST), max_tokens=1)
        await answer(engine, one_token)
        assert caplog.text.count("statistics") == 0, "the request has no draft"
        _, end = await answer(engine, request(engine, LIST))
    assert f"draft acceptance rate = {end.usage.accepted / end.usage.drafted:.5f} (" in caplog.text
    # The first request feeds its prompt only if a slow machine divides the prefill.
    assert re.search(r"statistics ngram_simple: #calls\(b,g,a\) = [12] ", caplog.text)
    assert "statistics ngram_mod" not in caplog.text, "the type has made no draft"


async def test_lengths_by_measured_cost_keep_the_output(short_model: Path, plain: dict[float, list[list[int]]]) -> None:
    async with Engine.open(config(short_model, types=["auto"], order="measured")) as engine:
        for _ in range(2):
            ids, _ = await generate_all(engine, 0.8)
            assert ids == plain[0.8]
        stats = engine.stats()
    seconds = stats.step_seconds
    assert 0 < seconds[1] < seconds[8] < seconds[64], "measured at start"
    assert any(drafts.drafted and drafts.spent > 0 for drafts in stats.drafts)


async def test_a_second_start_measures_nothing(
    short_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caplog.set_level(logging.INFO, "paceline.pace")
    for _ in range(2):
        async with Engine.open(config(short_model)) as engine:
            assert engine.stats().step_seconds[16] > 0
    assert caplog.text.count("calibration: measured passes of") == 1
