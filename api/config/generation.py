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
            description="maximum new tokens of every request; -1 is no maximum besides the context, or with "
            "--context-shift as many tokens as the context has unless the request sets max_tokens; -2 ends at a full "
            "context",
        ),
    ] = -1
    ignore_eos: Annotated[bool, Meta(description="never sample an end token, as ignore_eos of a request")] = False
    logit_bias: Annotated[
        tuple[str, ...],
        Meta(
            description="token id and bias, such as 15043+1 or 15043-inf; logit_bias of a request replaces all of them"
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
        Meta(description="GBNF or Lark grammar of requests that have neither a form of structured output nor tools"),
    ] = ""
    grammar_file: Annotated[str, Meta(description="file with the text of --grammar")] = ""
    json_schema: Annotated[str, Meta(description="JSON schema of requests without a form or tools, as --grammar")] = ""
    json_schema_file: Annotated[str, Meta(description="file with the text of --json-schema")] = ""
    reverse_prompt: Annotated[tuple[str, ...], Meta(description="stop string of requests without stop")] = ()
    special: Annotated[bool, Meta(description="outputs contain the names of special tokens, except end tokens")] = False
    cache_prompt: Annotated[
        bool, Meta(description="reuse cached prefixes, unless cache_prompt of a request differs")
    ] = True
    escape: Annotated[
        bool,
        Meta(description=r"process \n, \r, \t, \', \", \\ and \xHH in --reverse-prompt and --dry-sequence-breaker"),
    ] = True
