"""Defaults of requests besides the sampling parameters, as a Struct like those of `engine.config`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class GenerationConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits, constraints and stop strings of requests that set none."""

    n_predict: Annotated[
        int,
        Meta(
            ge=-2,
            le=2**31 - 1,
            description="maximum new tokens of every request (in llama-server a default that requests may exceed); "
            "-1 sets no maximum: without max_tokens an output ends at a full context, or with --context-shift "
            "after as many tokens as the context has; -2 ends an output without max_tokens at a full context, also "
            "with --context-shift",
        ),
    ] = -1
    ignore_eos: Annotated[bool, Meta(description="default of ignore_eos in requests: never sample an end token")] = (
        False
    )
    logit_bias: Annotated[
        tuple[str, ...],
        Meta(
            description="token id and bias, such as 15043+1 or 15043-inf; a request's logit_bias replaces all of these"
        ),
    ] = ()
    samplers: Annotated[
        str, Meta(description="stages of sampling in order, separated by semicolons; empty is llama-server's order")
    ] = ""
    sampler_seq: Annotated[
        str,
        Meta(description="letters of the stages in order, such as edskypmxt; replaces --samplers"),
    ] = ""
    grammar: Annotated[
        str,
        Meta(description="GBNF or Lark grammar of requests without structured output and without tools"),
    ] = ""
    grammar_file: Annotated[str, Meta(description="file with the text of --grammar")] = ""
    json_schema: Annotated[str, Meta(description="JSON schema of the same requests as --grammar")] = ""
    json_schema_file: Annotated[str, Meta(description="file with the text of --json-schema")] = ""
    reverse_prompt: Annotated[tuple[str, ...], Meta(description="stop string of requests without the field stop")] = ()
    special: Annotated[bool, Meta(description="outputs contain the names of special tokens, except end tokens")] = False
    cache_prompt: Annotated[bool, Meta(description="default of cache_prompt in requests: reuse cached prefixes")] = True
    escape: Annotated[
        bool,
        Meta(description=r"process \n, \r, \t, \', \", \\ and \xHH in --reverse-prompt and --dry-sequence-breaker"),
    ] = True
