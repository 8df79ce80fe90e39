"""The parameters of a request, as in llama-server's `generation_settings` and /props."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from api.schema.logit_bias import BAN_BIAS
from engine import Request, SamplingParams


def default_settings(
    defaults: SamplingParams,
    *,
    n_predict: int = -1,
    keep: int = 0,
    ignore_eos: bool = False,
    stop: Sequence[str] = (),
) -> dict[str, object]:
    """Returns the parameters of a request that sets none, with the server's defaults."""
    settings = msgspec.structs.asdict(defaults)
    del settings["logit_bias"]
    return {
        **settings,
        "seed": -1 if defaults.seed is None else defaults.seed,
        "n_predict": n_predict,
        "max_tokens": n_predict,
        "min_tokens": 0,
        "n_keep": keep,
        "n_discard": 0,
        "ignore_eos": ignore_eos,
        "stop": stop,
        "stream": False,
        "n_probs": 0,
        "timings_per_token": False,
        "post_sampling_probs": False,
        "backend_sampling": False,
        "lora": (),
    }


def request_settings(request: Request, seed: int, *, stream: bool, keep: int, ends: Iterable[int]) -> dict[str, object]:
    """Returns the parameters of `request`. A request with the seed `seed` reproduces the completion.

    `keep` is the server's value of `n_keep`, and `ends` are the model's end tokens, which `ignore_eos` bans. The bias
    of a banned token is null.
    """
    max_tokens = -1 if request.max_tokens is None else request.max_tokens
    speculation = request.speculation
    biases = [(token, None if bias <= BAN_BIAS else bias) for token, bias in request.sampling.logit_bias]
    if request.ignore_eos:
        biases += [(token, None) for token in sorted(ends)]
    settings = default_settings(request.sampling) | {
        "seed": seed,
        "n_predict": max_tokens,
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "n_keep": keep if request.keep is None else request.keep,
        "ignore_eos": request.ignore_eos,
        "stop": request.stop,
        "stream": stream,
        "n_probs": request.logprobs or 0,
        "post_sampling_probs": request.post_sampling,
        "lora": [{"id": each.id, "scale": each.scale} for each in request.adapters or ()],
        "logit_bias": [{"token": token, "bias": bias} for token, bias in biases],
    }
    if speculation is not None:
        settings["speculative.types"] = ",".join(speculation.type) or "none"
    return settings
