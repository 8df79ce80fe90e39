"""Compiles grammar specs off the event loop, within limits of size and time."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.backend import Vocab
from engine.grammar.gbnf import lark_from_gbnf
from engine.grammar.jobs import JobQueue, JobTimeout
from engine.grammar.matcher import Matcher
from engine.grammar.relax import RelaxedSchema, drop_keyword, relax_schema, rewritten, rewritten_lark
from engine.grammar.schema import Schema, check_multiples, embedded_schemas, parse_schema, unusable_keyword
from engine.grammar.spec import (
    CompileTimeout,
    Gbnf,
    GrammarError,
    GrammarSpec,
    JsonObject,
    JsonSchema,
    Lark,
    OneOfTexts,
    Regex,
)
from engine.grammar.tokenizer import build_tokenizer
from engine.histogram import Buckets, Histogram

# Maximum bytes of an encoded spec.
MAX_GRAMMAR_BYTES = 2**18
# Maximum number of brackets that are open at once in a grammar or a regular expression.
MAX_BRACKET_DEPTH = 200
# Maximum time of one compilation, including its time in the queue.
COMPILE_SECONDS = 10.0
# Maximum time after which no further keyword of a schema that is not strict is dropped.
RELAX_SECONDS = 4.0
# Maximum number of cached grammars.
CACHED_GRAMMARS = 256
# By default the library allows one million units of work, about 20 ms, for the lexer of a grammar, and 200,000 for one
# mask. It also allows 250,000 lexer states of 1-2 kB, which live as long as the grammar; here they are fewer.
PARSER_LIMITS = LLParserLimits(verbose_errors=False, max_lexer_states=50_000)

# The whitespace that llama.cpp's JSON grammars allow, so that a model cannot emit an endless run of spaces.
JSON_DEFAULTS = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}"}
JSON_OVERRIDES = {"lenient": False}


class Grammar:
    """A compiled spec. Any number of outputs can use it."""

    def __init__(
        self,
        spec: GrammarSpec,
        native: LLMatcher | None,
        vocabulary: int,
        ends: frozenset[int],
        relaxed: RelaxedSchema | None = None,
    ) -> None:
        self.spec = spec
        self.relaxed = relaxed
        """The part of the schema that the grammar enforces. None if the spec is not a JSON schema."""
        self.vocabulary = vocabulary
        """Number of tokens in the vocabulary."""
        self.exhausted = False
        """True once an output failed, for example because of too many lexer states. All outputs of a grammar share the
        states, so the spec must be compiled again."""
        self._native = native
        self._ends = ends

    def __reduce__(self) -> tuple[Any, ...]:
        return Grammar, (self.spec, None, self.vocabulary, self._ends, self.relaxed)

    def begin(self) -> Matcher:
        """Returns the matcher of a new, empty output. Any thread may call it. Must not be called on a copy from another
        process, which has no native matcher."""
        assert self._native is not None, "compiled in this process"
        return Matcher(self._native, self._ends, self._exhaust)

    def _exhaust(self) -> None:
        self.exhausted = True


class GrammarCompiler:
    """Compiles and caches the grammars of one model. Its methods must be called on the event loop."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._cache: OrderedDict[bytes, Grammar] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._seconds = Buckets()  # guarded by `_cache_lock`
        self._tokenizer_lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._jobs: JobQueue[Grammar] = JobQueue("paceline-grammar", COMPILE_SECONDS)

    async def compile(self, spec: GrammarSpec) -> Grammar:
        """Returns the grammar of `spec`.

        Raises GrammarError if the spec is invalid, unsupported or too large, CompileTimeout after `COMPILE_SECONDS`,
        and CompilerClosed once the compiler is closed.
        """
        encoded = msgspec.msgpack.encode(spec)
        if len(encoded) > MAX_GRAMMAR_BYTES:
            raise GrammarError(
                f"{_subject(spec)} of {len(encoded)} bytes is too large; at most {MAX_GRAMMAR_BYTES} are allowed."
            )
        key = hashlib.sha256(encoded).digest()
        if (cached := self._cached(key)) is not None:
            return cached
        try:
            return await self._jobs.run(key, partial(self._compile, key, spec))
        except JobTimeout:
            raise CompileTimeout(f"{_subject(spec)} was not compiled within {COMPILE_SECONDS:.0f} seconds.") from None

    async def warm_up(self) -> None:
        """Compiles a first grammar, for which the library analyses the vocabulary with the GIL held. Called before
        requests run. Returns after at most `COMPILE_SECONDS`; the analysis then continues in the background."""
        with suppress(GrammarError):
            await self.compile(JsonObject())

    @property
    def seconds(self) -> Histogram:
        """Durations of the successful compilations, without their time in the queue."""
        return self._seconds.snapshot()

    def close(self) -> None:
        """Makes all running and later calls of `compile` raise CompilerClosed."""
        self._jobs.close()

    def _cached(self, key: bytes) -> Grammar | None:
        with self._cache_lock:
            cached = self._cache.get(key)
            if cached is not None and cached.exhausted:
                del self._cache[key]
                cached = None
            elif cached is not None:
                self._cache.move_to_end(key)
            return cached

    # ── on a worker thread ──

    def _compile(self, key: bytes, spec: GrammarSpec) -> Grammar:
        tokenizer, relaxed = self._get_tokenizer(), None
        begun = time.perf_counter()
        if isinstance(spec, JsonSchema):
            schema = relax_schema(parse_schema(spec.schema), strict=spec.strict)
            native, relaxed = _compile_schema(schema, spec.strict, tokenizer)
        else:
            native = _matcher(_source(spec), tokenizer, _subject(spec))
        grammar = Grammar(spec, native, self._vocab.size, self._vocab.ends, relaxed)
        with self._cache_lock:
            self._seconds.add(time.perf_counter() - begun)
            self._cache[key] = grammar
            if len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return grammar

    def _get_tokenizer(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = build_tokenizer(self._vocab)
            return self._tokenizer


def _compile_schema(relaxed: RelaxedSchema, strict: bool, tokenizer: LLTokenizer) -> tuple[LLMatcher, RelaxedSchema]:
    """Returns the native matcher at an empty output, and the part of the schema that it enforces.

    Drops a keyword that cannot be followed, then the next one, unless `strict`. Raises GrammarError with the JSON
    pointer of the keyword that causes the library's error.
    """
    deadline = time.perf_counter() + RELAX_SECONDS
    while True:
        try:
            return _schema_matcher(relaxed.schema, tokenizer), relaxed
        except GrammarError as error:
            if strict or error.pointer is None or time.perf_counter() > deadline:
                raise
            fewer = drop_keyword(relaxed, error.pointer)
            if fewer is None:
                raise
            relaxed = fewer


def _schema_matcher(schema: Schema, tokenizer: LLTokenizer) -> LLMatcher:
    """Returns the native matcher of `schema`. Raises GrammarError with the JSON pointer of the keyword that causes the
    library's error."""

    def error_of(variant: Schema) -> str:
        return LLMatcher.validate_grammar(_json_grammar(variant), tokenizer, limits=PARSER_LIMITS)

    check_multiples(schema)
    source = _json_grammar(schema)
    try:
        return _matcher(source, tokenizer, "The schema")
    except GrammarError:
        if not (error := error_of(schema)):
            raise
    pointer = unusable_keyword(schema, error, error_of)
    where = f" at {pointer}" if pointer else ""
    raise GrammarError(f"The schema cannot be followed{where}: {_first_line(error)}", pointer)


def _matcher(source: str, tokenizer: LLTokenizer, subject: str) -> LLMatcher:
    native = LLMatcher(tokenizer, source, log_level=0, limits=PARSER_LIMITS)
    if not native.is_error():
        native.compute_bitmask()  # so that the first lexer states are not built in a step
    if native.is_error():
        raise GrammarError(f"{subject} cannot be used: {_first_line(native.get_error())}")
    return native


def _json_grammar(schema: Schema) -> str:
    text = json.dumps(rewritten(schema))
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(text, defaults=JSON_DEFAULTS, overrides=JSON_OVERRIDES)  # type: ignore[arg-type]
    except ValueError as error:  # for example a number out of range
        raise GrammarError(f"The schema cannot be followed: {_first_line(str(error))}") from None
    return grammar


def _source(spec: GrammarSpec) -> str:
    """Returns a spec other than a JSON schema in llguidance's grammar format. Raises GrammarError."""
    match spec:
        case JsonObject():
            return _json_grammar({"type": "object"})
        case Regex(pattern):
            _check_bracket_depth(pattern, "The expression")
            return LLMatcher.grammar_from_regex(pattern)
        case OneOfTexts(texts):
            if not texts:
                raise GrammarError("A choice needs at least one text.")
            alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return LLMatcher.grammar_from_lark(f"start: {alternatives}")
        case Gbnf(text):
            _check_bracket_depth(text, "The grammar")
            return LLMatcher.grammar_from_lark(lark_from_gbnf(text))
        case Lark(text):
            _check_bracket_depth(text, "The grammar")
            check_multiples([*embedded_schemas(text)])
            return LLMatcher.grammar_from_lark(rewritten_lark(text))
    raise AssertionError("schemas are compiled by _compile_schema")


def _check_bracket_depth(text: str, subject: str) -> None:
    """Raises GrammarError if too many brackets are open at once. Brackets in quotes count as well."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    if deepest > MAX_BRACKET_DEPTH:
        raise GrammarError(f"{subject} is nested {deepest} levels deep; at most {MAX_BRACKET_DEPTH} are allowed.")


def _subject(spec: GrammarSpec) -> str:
    names = {JsonSchema: "The schema", Regex: "The expression", OneOfTexts: "The choice"}
    return names.get(type(spec), "The grammar")


def _first_line(error: str) -> str:
    """Returns the first line of a library error, which the dump of the library's internal state follows."""
    line = error.strip().partition("\n")[0][:500]
    return "no text is of this form" if line.startswith("NoExtension") else line
