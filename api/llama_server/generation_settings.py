"""The parameters of a request, as in llama-server's `generation_settings` and /props."""

from __future__ import annotations

import msgspec

from engine import Request, SamplingParams

# Sampler stages in the order of execution, by llama-server's names. `top_n_sigma` is always off.
SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")


def default_settings(defaults: SamplingParams) -> dict[str, object]:
    """Returns the parameters of a request that sets none."""
    settings = msgspec.structs.asdict(defaults)
    del settings["logit_bias"]
    return {
        **settings,
        "seed": -1 if defaults.seed is None else defaults.seed,
        "n_predict": -1,
        "max_tokens": -1,
        "min_tokens": 0,
        "ignore_eos": False,
        "stop": (),
        "stream": False,
        "n_probs": 0,
        "samplers": SAMPLERS,
        "timings_per_token": False,
        "post_sampling_probs": False,
        "lora": (),
    }


def request_settings(request: Request, seed: int, *, stream: bool) -> dict[str, object]:
    """Returns the parameters of `request`. A request with the seed `seed` reproduces the completion."""
    max_tokens = -1 if request.max_tokens is None else request.max_tokens
    speculation = request.speculation
    settings = default_settings(request.sampling) | {
        "seed": seed,
        "n_predict": max_tokens,
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "stop": request.stop,
        "stream": stream,
        "n_probs": request.logprobs or 0,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in request.sampling.logit_bias],
    }
    if speculation is not None:
        settings["speculative.types"] = ",".join(speculation.type) or "none"
    return settings
