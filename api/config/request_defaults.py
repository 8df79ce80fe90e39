"""Defaults of requests from the options: files, escapes and notations of llama-server are resolved."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from api.config.generation import GenerationConfig
from api.config.options import Options
from api.config.samplers import MAX_SAMPLERS, stages_of_letters, stages_of_names
from api.config.values import OptionError
from engine import DEFAULT_SAMPLERS, SamplerStage

_BIAS = re.compile(r"\s*(\d{1,10})\s*([+-].+)")
# Maximum absolute bias; -inf becomes that of a banned token.
_MAX_BIAS = 1e9
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def with_request_defaults(options: Options) -> Options:
    """Returns the options with the contents of grammar and schema files, with processed escapes, and with stages and
    biases as sampling parameters. Raises OptionError."""
    _check_draft_lengths(options)
    given, sampling = options.generation, options.sampling
    breakers = () if sampling.dry_sequence_breakers == ("none",) else sampling.dry_sequence_breakers
    reverse_prompt = given.reverse_prompt
    if given.escape:
        breakers, reverse_prompt = tuple(map(_unescaped, breakers)), tuple(map(_unescaped, reverse_prompt))
    grammar = _one_text(given.grammar, given.grammar_file, "--grammar")
    schema = _one_text(given.json_schema, given.json_schema_file, "--json-schema")
    if grammar and schema:
        raise OptionError("--grammar and --json-schema exclude each other: an output has one grammar")
    if schema:
        _check_schema(schema)
    return msgspec.structs.replace(
        options,
        generation=msgspec.structs.replace(given, grammar=grammar, json_schema=schema, reverse_prompt=reverse_prompt),
        sampling=msgspec.structs.replace(
            sampling,
            dry_sequence_breakers=breakers,
            samplers=_stages(given) or sampling.samplers,
            logit_bias=_biases(given.logit_bias) or sampling.logit_bias,
        ),
    )


def _stages(given: GenerationConfig) -> tuple[SamplerStage, ...]:
    flag = "--sampler-seq" if given.sampler_seq else "--samplers"
    try:
        if given.sampler_seq:
            stages = stages_of_letters(given.sampler_seq)
        else:
            stages = stages_of_names(filter(None, given.samplers.split(";"))) if given.samplers else DEFAULT_SAMPLERS
    except ValueError as error:
        raise OptionError(f"{flag}: {error}") from None
    if len(stages) > MAX_SAMPLERS:
        raise OptionError(f"{flag}: {len(stages)} stages are too many: name at most {MAX_SAMPLERS}")
    return stages


def _biases(texts: Sequence[str]) -> tuple[tuple[int, float], ...]:
    biases = []
    for text in texts:
        found = _BIAS.fullmatch(text)
        try:
            bias = float(found[2]) if found else math.nan
        except ValueError:
            bias = math.nan
        if found is None or math.isnan(bias):
            raise OptionError(
                f"--logit-bias: expected a token id with a signed bias such as 15043+1, not {text[:64]!r}"
            )
        biases.append((int(found[1]), min(max(bias, -_MAX_BIAS), _MAX_BIAS)))
    return tuple(biases)


def _one_text(text: str, path: str, flag: str) -> str:
    """Returns the text, or that of the file. Raises OptionError if both are given, or the file cannot be read."""
    if not path:
        return text
    if text:
        raise OptionError(f"{flag} and {flag}-file exclude each other: give one of them")
    try:
        content = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"{flag}-file: cannot read {path}: {reason}") from None
    if not content.strip():
        raise OptionError(f"{flag}-file: {path} is empty: leave {flag}-file out")
    return content


def _check_draft_lengths(options: Options) -> None:
    """Raises OptionError if a minimum draft length is above the maximum, so that no draft would be verified."""
    draft, speculation = options.draft, options.speculation
    limits = {
        ("--draft-min", "--draft-max"): (draft.n_min, draft.n_max),
        ("--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max"): (speculation.mod_min, speculation.mod_max),
    }
    for (min_flag, max_flag), (minimum, maximum) in limits.items():
        if minimum > maximum:
            raise OptionError(f"{min_flag}: {minimum} is above {max_flag}, {maximum}: set it to at most {maximum}")


def _check_schema(schema: str) -> None:
    try:
        valid = isinstance(msgspec.json.decode(schema), dict)
    except (msgspec.DecodeError, RecursionError):
        valid = False
    if not valid:
        raise OptionError(f"--json-schema: expected a JSON object, not {schema[:64]!r}")


def _unescaped(text: str) -> str:
    """Returns the text with the escape sequences of llama-server replaced.

    >>> _unescaped(r"a\\n\\x41\\q")
    'a\\nA\\\\q'
    """
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)) if found[1] else _ESCAPED.get(found[2], found[2]), text)
