"""The stages in any order, Mirostat and adaptive-p against llama.cpp's samplers on the same rows of logits."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from engine.contract import Request, SamplingParams
from engine.sampling import Sampler
from engine.sampling.candidates import Candidates, Row
from engine.sampling.feedback import AdaptiveP, Mirostat
from engine.sampling.stages import active_stages
from engine.sampling_params import SamplerStage

VOCABULARY = 400
# llama.cpp has no penalties of a chain without a model's history, and the stage for code needs a vocabulary.
STAGES: tuple[SamplerStage, ...] = ("top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")


class NativeChain:
    """A chain of llama.cpp's samplers."""

    def __init__(self, samplers: Sequence[Any]) -> None:
        self._samplers = samplers

    def apply(self, row: Row) -> tuple[NDArray[np.intp], NDArray[np.float64], int]:
        """Returns the ids and logits that remain, and the index of the selected token, -1 for none."""
        data = (llama_cpp.llama_token_data * len(row))()
        for token, logit in enumerate(row.tolist()):
            data[token] = llama_cpp.llama_token_data(id=token, logit=logit, p=0.0)
        found = llama_cpp.llama_token_data_array(data=data, size=len(row), selected=-1, sorted=False)
        for sampler in self._samplers:
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(found))
        left = [found.data[at] for at in range(found.size)]
        return np.array([each.id for each in left]), np.array([each.logit for each in left]), found.selected

    def accept(self, token: int) -> None:
        for sampler in self._samplers:
            llama_cpp.llama_sampler_accept(sampler, token)

    def close(self) -> None:
        for sampler in self._samplers:
            llama_cpp.llama_sampler_free(sampler)


def native_stages(params: SamplingParams) -> NativeChain:
    keep = params.min_keep
    make = {
        "top_n_sigma": lambda: llama_cpp.llama_sampler_init_top_n_sigma(params.top_n_sigma),
        "top_k": lambda: llama_cpp.llama_sampler_init_top_k(params.top_k),
        "typ_p": lambda: llama_cpp.llama_sampler_init_typical(params.typical_p, keep),
        "top_p": lambda: llama_cpp.llama_sampler_init_top_p(params.top_p, keep),
        "min_p": lambda: llama_cpp.llama_sampler_init_min_p(params.min_p, keep),
        "xtc": lambda: llama_cpp.llama_sampler_init_xtc(params.xtc_probability, params.xtc_threshold, keep, 1),
        "temperature": lambda: llama_cpp.llama_sampler_init_temp_ext(
            params.temperature, params.dynatemp_range, params.dynatemp_exponent
        ),
    }
    return NativeChain([make[stage]() for stage in params.samplers])


def rows(seed: int, count: int, scale: float = 3.0) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield (rng.normal(size=VOCABULARY) * scale).astype(np.float32)


def distribution(ids: NDArray[np.intp], logits: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.zeros(VOCABULARY)
    result[ids] = np.exp(logits - logits.max())
    result /= result.sum()
    return result


def difference(found: Candidates, ids: NDArray[np.intp], logits: NDArray[np.float64]) -> float:
    """Returns the greatest difference of a probability."""
    return float(np.abs(distribution(found.ids, found.logits) - distribution(ids, logits)).max())


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.5, 1.0, 1.7]),
        dynatemp_range=rng.choice([0.0, 0.0, 0.4, 3.0]),
        dynatemp_exponent=rng.choice([1.0, 2.0]),
        top_k=rng.choice([0, 3, 40]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.05, 0.4]),
        typical_p=rng.choice([1.0, 0.9, 0.4]),
        xtc_probability=rng.choice([0.0, 1.0]),
        xtc_threshold=rng.choice([0.1, 0.3]),
        top_n_sigma=rng.choice([-1.0, 0.0, 1.0, 2.5]),
        min_keep=rng.choice([0, 0, 1, 5, 300]),
        samplers=tuple(rng.choices(STAGES, k=rng.randrange(9))),
    )


@pytest.mark.parametrize("seed", range(8))
def test_stages_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    for number in range(20):
        params = random_params(rng)
        # llama.cpp only marks what top_n_sigma drops, so that the entropies of later stages are undefined there.
        after = params.samplers[params.samplers.index("top_n_sigma") + 1 :] if "top_n_sigma" in params.samplers else ()
        if params.top_n_sigma > 0.0 and {"typ_p", "temperature", "xtc"} & set(after):
            continue
        sampler, chain = Sampler(Request(prompt=(0,), sampling=params), 1, frozenset(), lambda token: b"x"), None
        try:
            chain = native_stages(params)
            for row in rows(seed * 100 + number, 2, rng.choice([0.3, 3.0])):
                ids, logits, _ = chain.apply(row)
                assert difference(sampler.candidates(row, [0], 0), ids, logits) < 2e-5, (params, active_stages(params))
        finally:
            if chain is not None:
                chain.close()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("tau", "temperature"), [(5.0, 0.8), (2.0, 1.0), (3.0, 1.5)])
def test_mirostat(version: int, tau: float, temperature: float) -> None:
    params = SamplingParams(mirostat=version, mirostat_tau=tau, mirostat_eta=0.3, temperature=temperature)
    own = Mirostat(params)
    mirostat = (
        llama_cpp.llama_sampler_init_mirostat(VOCABULARY, 3, tau, 0.3, 100)
        if version == 1
        else llama_cpp.llama_sampler_init_mirostat_v2(3, tau, 0.3)
    )
    chain = NativeChain([llama_cpp.llama_sampler_init_temp(temperature), mirostat])
    # In flatter rows version 1 of llama.cpp keeps one token, as the number of tokens to keep overflows an int.
    for row in rows(version, 25, 3.0):
        ids, logits, selected = chain.apply(row)
        found = own.select(row)
        assert difference(found, ids, logits) < 2e-5
        own.advance(distribution(found.ids, found.logits)[ids[selected]])
    chain.close()


@pytest.mark.parametrize(("target", "decay"), [(0.5, 0.9), (0.0, 0.5), (1.0, 0.99)])
def test_adaptive_p(target: float, decay: float) -> None:
    params = SamplingParams(adaptive_target=target, adaptive_decay=decay, samplers=("min_p", "adaptive_p"))
    own = AdaptiveP(params)
    chain = NativeChain(
        [
            llama_cpp.llama_sampler_init_min_p(params.min_p, 0),
            llama_cpp.llama_sampler_init_adaptive_p(target, decay, 3),
        ]
    )
    sampler = Sampler(Request(prompt=(0,), sampling=params), 1, frozenset(), lambda token: b"x")
    sampler._adaptive = own
    for row in rows(4, 25, 1.5):
        ids, logits, selected = chain.apply(row)
        found = sampler.candidates(row, [0], 0)
        assert difference(found, ids, logits) < 2e-5
        assert found.probabilities is not None
        own.advance(float(found.probabilities[found.ids == ids[selected]][0]))
        chain.accept(int(ids[selected]))
    chain.close()
