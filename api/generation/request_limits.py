"""The options' defaults and limits for the fields of requests."""

from __future__ import annotations

from api.config.generation import GenerationConfig
from api.config.options import Options
from api.generation.constraints import compile_constraint, parse_constraint
from api.generation.loaded_model import LoadedModel
from api.schema.requests import GenerationRequest
from engine import PROPOSER_TYPES, ProposerType, RequestRefused, Speculation

# Maximum draft length of types that have no limit in the options.
_MAX_DRAFT_TOKENS = 1024


def apply_request_defaults(request: GenerationRequest, config: GenerationConfig) -> None:
    """Sets the fields that the request leaves out and the options define."""
    if config.reverse_prompt and not request.has_stop:
        request.stop = list(config.reverse_prompt)
    if request.ignore_eos is None:
        request.ignore_eos = config.ignore_eos or None
    if request.cache_prompt is None and not config.cache_prompt:
        request.cache_prompt = False
    if (config.grammar or config.json_schema) and not request.defines_output:
        request.grammar, request.json_schema = config.grammar or None, config.json_schema or None


def max_new_tokens(model: LoadedModel, token_limit: int | None, prompt_tokens: int) -> int | None:
    """Returns the maximum number of new tokens of a request with this limit; None for the engine's default."""
    maximum = model.options.generation.n_predict
    limit = None if token_limit == -1 else token_limit
    if maximum >= 0:
        return maximum if limit is None else min(limit, maximum)
    if maximum == -2 and limit is None:
        return max(0, model.engine.request_limit - prompt_tokens)
    return limit


def check_draft_limits(speculation: Speculation | None, options: Options) -> None:
    """Raises RequestRefused if `n_min` is above the maximum draft length of all types, so that no draft is verified."""
    if speculation is None or not speculation.n_min or not speculation.type:
        return
    types = PROPOSER_TYPES if "auto" in speculation.type else speculation.type
    longest = max(_longest_draft(kind, speculation.n_max, options) for kind in types if kind != "auto")
    if speculation.n_min > longest:
        raise RequestRefused(
            f"speculative.n_min: {speculation.n_min} is above the maximum draft length of {', '.join(types)}; set "
            f"it to at most {longest}.",
            field="speculative.n_min",
        )


def _longest_draft(kind: ProposerType, n_max: int | None, options: Options) -> int:
    config = options.speculation
    if kind in ("draft", "draft-mtp"):
        return options.draft.max_tokens(n_max)
    own: dict[ProposerType, int] = {
        "ngram-simple": config.simple_size_m or config.size_m,
        "ngram-map-k": config.map_k_size_m or config.size_m,
        "ngram-map-k4v": config.map_k4v_size_m or config.size_m,
        "ngram-cache": config.cache_max,
    }
    if kind == "ngram-mod":
        return max(config.mod_max, n_max or 0)
    return n_max or own.get(kind, _MAX_DRAFT_TOKENS)


async def check_request_defaults(model: LoadedModel) -> None:
    """Raises RequestRefused, which names the flag, if the options' logit biases or grammar cannot be used."""
    size = model.engine.vocab.size
    for token, _ in model.options.sampling.logit_bias:
        if token >= size:
            raise RequestRefused(f"--logit-bias: there is no token {token}; the model's tokens are 0 to {size - 1}.")
    request = GenerationRequest()
    apply_request_defaults(request, model.options.generation)
    try:
        await compile_constraint(model.engine, parse_constraint(request))
    except RequestRefused as error:
        flag = "--grammar" if request.grammar else "--json-schema"
        raise RequestRefused(f"{flag}: {error}") from None
