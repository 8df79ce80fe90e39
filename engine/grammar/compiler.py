"""From forms to grammars, off the event loop and within limits."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from contextlib import suppress
from functools import partial

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.backend import Vocab
from engine.grammar.bridge import tokenizer
from engine.grammar.forms import Choice, Form, Gbnf, GrammarError, JsonObject, JsonSchema, Lark, Regex, TooSlow
from engine.grammar.gbnf import lark_of
from engine.grammar.jobs import Jobs, Late
from engine.grammar.matcher import Matcher
from engine.grammar.schema import Schema, blamed, check_multiples, embedded, parsed, with_any_of

SIZE = 2**18
"""Bytes of a form at most."""
NESTED = 200
"""Brackets of a grammar or an expression that may be open at once."""
SECONDS = 10.0
"""Seconds that a request waits for its grammar, those in the queue before it included."""
KEPT = 256
"""Grammars that are kept for the next request that asks for the same."""
LIMITS = LLParserLimits(verbose_errors=False, max_lexer_states=50_000)
"""The library's own: a million units of work, about 20 ms, for the lexer of a grammar, 200,000 for one mask. But of its
250,000 states of 1 to 2 kB, which stay with a grammar that is kept, a fifth."""

JSON = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}"}
"""Between the parts of a JSON text stands what llama.cpp's grammars permit: a model cannot lose itself in spaces."""
STRICT = {"lenient": False}


class Grammar:
    """A form made ready, for any number of texts over one vocabulary."""

    def __init__(self, form: Form, native: LLMatcher, size: int, ends: frozenset[int]) -> None:
        self.form = form
        self.size = size
        """Tokens of the vocabulary."""
        self.spent = False
        """Whether a text failed, as when it took more states than there may be. All texts of a grammar share these: it
        must be made anew."""
        self._native = native
        self._ends = ends

    def begin(self) -> Matcher:
        """The start of a text. May be called from any thread."""
        return Matcher(self._native, self._ends, self._spend)

    def _spend(self) -> None:
        self.spent = True


class Grammars:
    """The grammars of one model. `compile` is called on the event loop."""

    def __init__(self, vocab: Vocab) -> None:
        self._vocab = vocab
        self._kept: OrderedDict[bytes, Grammar] = OrderedDict()
        self._lock = threading.Lock()  # for what is kept
        self._building = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._jobs: Jobs[Grammar] = Jobs("paceline-grammar", SECONDS)

    async def compile(self, form: Form) -> Grammar:
        """The grammar of `form`. Raises GrammarError if there is none, or if it is too large or takes too long, and
        Closed once this is closed."""
        encoded = msgspec.msgpack.encode(form)
        if len(encoded) > SIZE:
            raise GrammarError(f"{_kind(form)} of {len(encoded)} bytes is too large; at most {SIZE} are taken.")
        key = hashlib.sha256(encoded).digest()
        if (known := self._known(key)) is not None:
            return known
        try:
            return await self._jobs.run(key, partial(self._make, key, form))
        except Late:
            raise TooSlow(f"{_kind(form)} was not compiled within {SECONDS:.0f} seconds.") from None

    async def warm_up(self) -> None:
        """Compiles a first grammar before streams run: for it the library reads the vocabulary, all the while with
        Python's lock. Where that takes longer than a request would wait, it goes on meanwhile."""
        with suppress(GrammarError):
            await self.compile(JsonObject())

    def close(self) -> None:
        """Compiles nothing any more; for those who wait, and for who comes later, that is Closed."""
        self._jobs.close()

    def _known(self, key: bytes) -> Grammar | None:
        with self._lock:
            known = self._kept.get(key)
            if known is not None and known.spent:
                del self._kept[key]
                known = None
            elif known is not None:
                self._kept.move_to_end(key)
            return known

    # ── on a worker thread ──

    def _make(self, key: bytes, form: Form) -> Grammar:
        native = _compiled(form, self._tokens())
        made = Grammar(form, native, self._vocab.size, self._vocab.ends)
        with self._lock:
            self._kept[key] = made
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made

    def _tokens(self) -> LLTokenizer:
        with self._building:
            if self._tokenizer is None:
                self._tokenizer = tokenizer(self._vocab)
            return self._tokenizer


def _compiled(form: Form, tokens: LLTokenizer) -> LLMatcher:
    """Raises GrammarError."""
    if isinstance(form, JsonSchema):
        return _of_schema(parsed(form.schema), tokens)
    return _matcher(_source(form), tokens, _kind(form))


def _of_schema(schema: Schema, tokens: LLTokenizer) -> LLMatcher:
    def complaint(changed: Schema) -> str:
        return LLMatcher.validate_grammar(_json(changed), tokens, limits=LIMITS)

    source = _json(schema)
    try:
        return _matcher(source, tokens, "The schema")
    except GrammarError:
        if not (said := complaint(schema)):
            raise
    pointer = blamed(schema, said, complaint)
    where = f" at {pointer}" if pointer else ""
    raise GrammarError(f"The schema cannot be followed{where}: {_first_line(said)}", pointer)


def _matcher(source: str, tokens: LLTokenizer, kind: str) -> LLMatcher:
    native = LLMatcher(tokens, source, log_level=0, limits=LIMITS)
    if not native.is_error():
        native.compute_bitmask()  # the lexer's first states are made here and not in a step
    if native.is_error():
        raise GrammarError(f"{kind} cannot be used: {_first_line(native.get_error())}")
    return native


def _json(schema: Schema) -> str:
    text = json.dumps(with_any_of(schema))
    try:
        made: str = LLMatcher.grammar_from_json_schema(text, defaults=JSON, overrides=STRICT)  # type: ignore[arg-type]
    except ValueError as error:  # such as a number that is out of range
        raise GrammarError(f"The schema cannot be followed: {_first_line(str(error))}") from None
    return made


def _source(form: Form) -> str:
    match form:
        case JsonObject():
            return _json({"type": "object"})
        case Regex(pattern):
            _shallow(pattern, "The expression")
            return LLMatcher.grammar_from_regex(pattern)
        case Choice(texts):
            if not texts:
                raise GrammarError("A choice needs at least one text.")
            alternatives = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
            return LLMatcher.grammar_from_lark(f"start: {alternatives}")
        case Gbnf(text):
            _shallow(text, "The grammar")
            return LLMatcher.grammar_from_lark(lark_of(text))
        case Lark(text):
            _shallow(text, "The grammar")
            check_multiples([*embedded(text)])
            return LLMatcher.grammar_from_lark(text)
    raise AssertionError("schemas are compiled elsewhere")


def _shallow(text: str, kind: str) -> None:
    """Raises GrammarError if too many brackets are open at once; those in quotes count, too."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    if deepest > NESTED:
        raise GrammarError(f"{kind} is nested {deepest} levels deep; at most {NESTED} are taken.")


def _kind(form: Form) -> str:
    names = {JsonSchema: "The schema", Regex: "The expression", Choice: "The choice"}
    return names.get(type(form), "The grammar")


def _first_line(said: str) -> str:
    """What the library complains of, without what it tells about its state."""
    line = said.strip().partition("\n")[0][:500]
    return "no text is of this form" if line.startswith("NoExtension") else line
