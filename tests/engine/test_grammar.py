"""Specs compile to grammars, or are refused with the pointer of the wrong keyword; masks permit exactly the grammar's
tokens."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from random import Random
from typing import Any

import numpy as np
import pytest
from llguidance.gbnf_to_lark import gbnf_to_lark

from engine.grammar import (
    MAX_SCHEMA_DEPTH,
    Gbnf,
    Grammar,
    GrammarCompiler,
    GrammarError,
    GrammarSpec,
    JsonObject,
    JsonSchema,
    Lark,
    MaskRequest,
    Masks,
    Matcher,
    OneOfTexts,
    Regex,
    compiler,
    jobs,
    resolve_reference,
)
from engine.grammar.gbnf import lark_from_gbnf
from engine.grammar.jobs import JobQueue, JobTimeout
from engine.grammar.pointer import escape, resolve
from engine.grammar.schema import keywords, nesting_depth, one_of_as_any_of
from engine.grammar.tokenizer import BLOCK_CHARACTERS, build_tokenizer
from tests.engine.vocabularies import ASCII, PAIRS, AsciiVocab, bytes_of, grammar
from tests.toy import END

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def schema(value: Any) -> JsonSchema:
    return JsonSchema(json.dumps(value).encode())


def permitted(matcher: Matcher) -> set[int]:
    masks = Masks(ASCII.size)
    masks.begin([MaskRequest(0, matcher, ())])
    permits = masks.of(0)
    assert permits is not None
    return set(np.flatnonzero(permits(0)).tolist())


def random_output(compiled: Grammar, random: Random, max_tokens: int = 60) -> tuple[bytes, bool]:
    """Returns a random text that the masks permit, and True if it is complete."""
    matcher, output = compiled.begin(), bytearray()
    for _ in range(max_tokens):
        token = random.choice(sorted(permitted(matcher)))
        if token in ASCII.ends:
            return bytes(output), True
        output += ASCII.piece(token)
        matcher.accept_token(token)
        if matcher.complete:
            return bytes(output), True
    return bytes(output), False


# ── specs ──


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        (Regex("a{2,5}(b|true)"), "a{2,5}(b|true)"),
        (OneOfTexts(("yes", 'n"o', "never\n", "yes!")), 'yes|n"o|never\n|yes!'),
        (Gbnf('root ::= item ("," item)* "."\nitem ::= [a-c] [0-9]{2}'), r"[a-c]\d\d(,[a-c]\d\d)*\."),
        (Gbnf('root ::= start [\\u00e9-\\u00ef] "start"\nstart ::= "caf" # a start'), "caf[é-ï]start"),
        (Lark('start: "a" (B | "c")+ "."\nB: /b{2}/'), r"a(bb|c)+\."),
        (Lark('start: "call " %json {"enum": ["x", 3]}'), 'call ("x"|3)'),
        (schema({"enum": ["a", 1, None]}), '"a"|1|null'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_permitted_texts_match_the_spec(spec: GrammarSpec, pattern: str) -> None:
    compiled, ended = grammar(spec), 0
    for seed in range(30):
        text, whole = random_output(compiled, Random(seed))
        ended += whole
        assert not whole or re.fullmatch(pattern, text.decode())
    assert ended


@pytest.mark.parametrize("spec", [schema(PERSON), JsonObject(), schema({"type": "array", "items": {"type": "number"}})])
def test_outputs_of_json_specs_are_json(spec: GrammarSpec) -> None:
    ended = 0
    for seed in range(40):
        text, whole = random_output(grammar(spec), Random(seed), 300)
        if whole:
            json.loads(text)
            ended += 1
    assert ended


def test_a_schema_decides_the_permitted_tokens() -> None:
    matcher = grammar(schema(PERSON)).begin()
    for text in ('{"', "name", '":', ' "'):
        for token in ASCII.tokenize(text, special=False):
            assert token in permitted(matcher)
            matcher.accept_token(token)
    assert not ASCII.ends & permitted(matcher)
    for token in ASCII.tokenize('Ann", "age": 7}', special=False):
        assert not matcher.complete
        matcher.accept_token(token)
    assert matcher.complete


def test_end_tokens_are_permitted_where_the_output_is_complete() -> None:
    matcher = grammar(Regex("a(aa)*")).begin()
    for _ in range(5):
        assert not ASCII.ends & permitted(matcher)
        matcher.accept_token(ord("a"))
        assert permitted(matcher) == {ord("a"), *ASCII.ends}, "all end tokens"
        matcher.accept_token(ord("a"))


def test_an_output_without_continuation_is_complete() -> None:
    matcher = grammar(OneOfTexts(("true",))).begin()
    matcher.accept_token(ASCII.tokenize("true", special=False)[0])
    assert matcher.complete
    assert permitted(matcher) == ASCII.ends


def test_special_tokens_are_permitted_by_name_only() -> None:
    assert not permitted(grammar(Regex(r"(.|\n)*")).begin()) & {ASCII.call}
    matcher = grammar(Lark('start: /[ab]*/ (<|call|> "b")?')).begin()
    assert permitted(matcher) == {ord("a"), ord("b"), ASCII.call, *ASCII.ends}
    matcher.accept_token(ASCII.call)
    assert permitted(matcher) == {ord("b")}
    text = grammar(Regex(r"<\|call\|>")).begin()
    assert permitted(text) == {ord("<")}, "spelled out, a special token is text"


def test_characters_of_several_tokens() -> None:
    matcher = grammar(OneOfTexts(("é!",))).begin()
    first, second, _ = range(ASCII.size - 6, ASCII.size - 3)
    assert permitted(matcher) == {first}
    matcher.accept_token(first)
    assert permitted(matcher) == {second}


def test_the_tokenizer_has_every_token() -> None:
    tokenizer = build_tokenizer(ASCII)
    assert tokenizer.vocab_size == ASCII.size
    for token in range(ASCII.size):
        assert tokenizer.is_special_token(token) == (token in ASCII.special)
        if token not in ASCII.special and ASCII.piece(token) != b"\xff":
            assert tokenizer.decode_bytes([token]) == ASCII.piece(token)
    assert tokenizer.tokenize_str('{"name": true}') == ASCII.tokenize('{"name": true}', special=False)


def test_drafts_are_cut_where_the_grammar_or_an_end_token_ends_them() -> None:
    matcher = grammar(Regex("(AB)+"), PAIRS).begin()
    assert matcher.validate_tokens(PAIRS.tokenize("ABABAB", special=False)) == 3
    assert matcher.validate_tokens([1, 2, 1, 1, 2]) == 3
    assert matcher.validate_tokens([1, 2, END]) == 2, "no row after an end would be used"


# ── drafts ──


def test_forced_tokens() -> None:
    assert grammar(schema(PERSON), ASCII).begin().forced_tokens(8) == [], (
        "white space may come first, or the bracket alone"
    )
    matcher = grammar(Lark('start: "[name]" /[a-z]/ "true"')).begin()
    tokens = matcher.forced_tokens(8)
    assert tokens == ASCII.tokenize("[name]", special=False)
    assert matcher.forced_tokens(2) == tokens[:2]
    for token in tokens:
        assert permitted(matcher) == {token}, "although single letters could spell the word"
        matcher.accept_token(token)
    assert matcher.forced_tokens(8) == []
    matcher.accept_token(ord("x"))
    assert bytes_of(matcher.forced_tokens(8)) == b"true"
    matcher.accept_token(*matcher.forced_tokens(8))
    assert matcher.forced_tokens(8) == []


class SpacePrefixVocab(AsciiVocab):
    """A vocabulary that prepends a space to every text, as those of some models do."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return super().tokenize(f" {text}", special=special)


@pytest.mark.parametrize("vocab", [AsciiVocab(), SpacePrefixVocab()], ids=lambda vocab: type(vocab).__name__)
def test_forced_texts_are_tokenized_to_the_byte(vocab: AsciiVocab) -> None:
    """This holds even if the vocabulary changes a text or has no token for it."""
    for text in ("name", ' "name"', "é!", "<|call|>", "x"):
        matcher = grammar(OneOfTexts((text,)), vocab).begin()
        assert bytes_of(matcher.forced_tokens(20)) == text.encode()


class CountingVocab(AsciiVocab):
    """A vocabulary that records the tokenized texts."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        self.texts.append(text)
        return super().tokenize(text, special=special)


def test_a_long_forced_text_is_tokenized_in_blocks_and_once() -> None:
    vocab, text = CountingVocab(), "name true" * 1000
    matcher = grammar(OneOfTexts((text,)), vocab).begin()
    tokens = matcher.forced_tokens(10_000)
    assert bytes_of(tokens) == text.encode()
    assert max(map(len, vocab.texts)) <= BLOCK_CHARACTERS + 1
    rest = text.encode()
    for token in tokens[:20]:
        matcher.accept_token(token)
        before = len(vocab.texts)
        rest = rest[len(vocab.piece(token)) :]
        assert bytes_of(matcher.forced_tokens(10_000)) == rest
        assert len(vocab.texts) <= before + 4


def test_masks_of_many_rows() -> None:
    """Each mask equals the mask of a matcher that has accepted the draft tokens before the row."""
    compiled = grammar(schema(PERSON))
    texts = ('{"name": "x', "", '{\n "', '{"name": "abc", "age": 12')
    drafts = (' "y", "age"', '{"name"', "nam", "34}")
    masks, requests = Masks(ASCII.size), []
    for key, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
        matcher = compiled.begin()
        for token in ASCII.tokenize(text, special=False):
            matcher.accept_token(token)
        tokens = ASCII.tokenize(draft, special=False)
        requests.append(MaskRequest(key, matcher, tokens[: matcher.validate_tokens(tokens)]))
    masks.begin(requests)
    assert masks.of(99) is None
    for request in requests:
        permits = masks.of(request.key)
        assert permits is not None
        for row in range(len(request.draft) + 1):
            assert set(np.flatnonzero(permits(row)).tolist()) == permitted(request.matcher)
            if row < len(request.draft):
                request.matcher.accept_token(request.draft[row])


def test_overlapped_masks_are_the_same() -> None:
    compiled = grammar(Regex("[ab]{3}c"))
    inline, overlapped = Masks(ASCII.size), Masks(ASCII.size, overlapped=True)
    for masks in (inline, overlapped):
        masks.begin([MaskRequest(1, compiled.begin(), (ord("a"),))])
        masks.begin([MaskRequest(2, compiled.begin(), (ord("a"), ord("b")))])
    for row in range(3):
        inline_mask, overlapped_mask = inline.of(2), overlapped.of(2)
        assert inline_mask is not None
        assert overlapped_mask is not None
        assert (inline_mask(row) == overlapped_mask(row)).all()
    overlapped.close()


# ── refusals ──

IF = {"if": {"type": "string"}, "then": {"minLength": 3}}


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "/properties/a/uniqueItems"),
        ({"properties": {"not": {"not": {"const": "a"}}}}, "/properties/not/not"),
        ({"properties": {"a/b~": {"type": "string", "pattern": "(?=a)b"}}}, "/properties/a~1b~0/pattern"),
        ({"items": {"type": "string", "pattern": "(?<=a)b"}}, "/items/pattern"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": IF, "c": IF}}, "/$defs/b/if"),
        ({"anyOf": [{"type": "string"}, {"propertyNames": {"minLength": 3}}]}, "/anyOf/1/propertyNames"),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, "/oneOf"),
        ({"$ref": "#/$defs/nowhere"}, "/$ref"),
        ({"type": "strng"}, "/type"),
        ({"properties": {"a": {"$ref": "https://example.org/schema"}}}, "/properties/a/$ref"),
    ],
)
def test_an_unsupported_keyword_is_refused_by_its_pointer(wrong: Any, pointer: str) -> None:
    with pytest.raises(GrammarError) as refusal:
        grammar(schema(wrong))
    assert refusal.value.pointer == pointer
    assert pointer in str(refusal.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (JsonSchema(b"{"), "not valid JSON"),
        (JsonSchema(b"\xff"), "not valid JSON"),
        (JsonSchema(b"[]"), "JSON object"),
        (JsonSchema(b"[" * 100_000), "not valid JSON"),
        (schema({"minimum": 3, "maximum": 2, "type": "integer"}), "cannot be followed"),
        (JsonSchema(b'{"type": "integer", "maximum": 1' + b"0" * 400 + b"}"), "schema"),
        (JsonSchema(b'{"type": "integer", "maximum": 1' + b"0" * 5000 + b"}"), "schema"),
        (schema({"anyOf": [{}], "properties": {"a": {"$ref": "#/anyOf/" + "9" * 5000}}}), "cannot be followed"),
        (Regex("(a"), "expression"),
        (Regex("(" * 100_000 + ")" * 100_000), "nested 100000 levels"),
        (OneOfTexts(()), "at least one"),
        (Gbnf('rot ::= "a"'), "root"),
        (Gbnf("root ::= (" * 3), "GBNF"),
        (Gbnf("root ::= nowhere"), "nowhere"),
        (Gbnf("[)" * 100_000), "GBNF"),
        (Gbnf('"' + '\\"' * 100_000), "GBNF"),
        (Lark("start: nowhere"), "nowhere"),
        (Lark("start: start"), "no text is of this form"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}), "no text is of this form"),
        (schema({"allOf": [{"$ref": "#"}], "type": "object"}), "circular"),
        (Lark("start: <|nowhere|>"), "special token"),
        (Lark("start: ((((((" * 1000), "nested"),
        (JsonSchema(b'{"enum": ["' + b"x" * 2**18 + b'"]}'), "too large"),
        (schema({"type": "integer", "multipleOf": 999_999_937}), "multipleOf is too large"),
        (schema({"type": "integer", "allOf": [{"multipleOf": each} for each in (97, 89, 83, 79)]}), "multipleOf"),
        (Lark('start: "x" %json {"type": "integer", "multipl\\u0065Of": 999999937}'), "multipleOf"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_unusable_specs_are_refused(spec: GrammarSpec, message: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(message)):
        grammar(spec)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= item ("," item)* "."\nitem ::= [a-c] digit{2}\ndigit ::= [0-9]',
        'root ::= a-b | "x"\na-b ::= "(" root ")" | cD\ncD ::= e e\ne ::= "y" | e "z"\nf ::= cD',
    ],
)
def test_gbnf_equals_the_converters_result(text: str) -> None:
    assert lark_from_gbnf(text).split() == gbnf_to_lark(text).split()


def test_gbnf_comments_are_dropped() -> None:
    """llguidance's converter copies all comments for each comment, which takes seconds in a spec of the maximum
    size."""
    text = "# one\n" + "#\n" * 100_000 + 'root ::= "#" [#] # the last'
    assert lark_from_gbnf(text).split() == ["%llguidance", "{}", "start:", '"#"', "/[#]/"]


def test_a_chain_of_rules_does_not_take_long() -> None:
    """llguidance's converter alone would take minutes."""
    text = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(10_000)) + '\nr10000 ::= "a"'
    assert lark_from_gbnf(text).endswith('R9999: R10000\nR10000: "a"\n')


@pytest.mark.parametrize("text", ["[)" * 100_000, '"' + '\\"' * 100_000], ids=["classes", "quotes"])
def test_unclosed_parts_do_not_take_long(text: str) -> None:
    """A search for the end of each part would take minutes."""
    with pytest.raises(GrammarError, match="not valid GBNF"):
        lark_from_gbnf(f"root ::= {text}")


def test_the_longest_chain_of_rules() -> None:
    """With a smaller thread stack the chain would crash the process."""
    text = "start: r0\n" + "\n".join(f"r{i:x}:r{i + 1:x}" for i in range(19_000)) + f'\nr{19_000:x}: "a"'
    assert 2**17 < len(text) < compiler.MAX_GRAMMAR_BYTES
    assert permitted(grammar(Lark(text)).begin()) == {ord("a")}


def test_a_deep_schema_is_refused_before_it_reaches_native_code() -> None:
    deep: Any = {"type": "string"}
    for _ in range(MAX_SCHEMA_DEPTH // 2 - 1):
        deep = {"properties": {"a": deep}}
    assert nesting_depth(deep) <= MAX_SCHEMA_DEPTH
    grammar(schema(deep))
    with pytest.raises(GrammarError, match=f"at most {MAX_SCHEMA_DEPTH}"):
        grammar(schema({"properties": {"a": {"properties": {"a": deep}}}}))


def test_names_of_properties_are_no_keywords() -> None:
    found = [
        keyword.pointer for keyword in keywords({"properties": {"not": {"enum": [{"if": 1}]}}, "$defs": {"x": {}}})
    ]
    assert found == ["/properties", "/$defs", "/properties/not/enum"]


POINTED: Any = {"a/b": 1, "a~1b": 2, "~01": 3, "a b%": 4, "": 5, "l": [6, [7]], "n": None}


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("#", POINTED),
        ("#/a~1b", 1),
        ("#/a~01b", 2),
        ("#/~001", 3),
        ("#/a%20b%25", 4),
        ("#/a%2Fb", None),
        ("#/", 5),
        ("#/l/0", 6),
        ("#/l/1/0", 7),
        ("#/l/2", None),
        ("#/l/00", None),
        ("#/l/-", None),
        ("#/l/-1", None),
        ("#/l/\u0661", None),
        ("#/l/" + "9" * 5000, None),
        ("#/a~1b/x", None),
        ("#/n", None),
        ("#a~1b", None),
        ("https://example.org#/a~1b", None),
        ("/a~1b", None),
        (7, None),
    ],
)
def test_references_are_resolved(reference: Any, value: Any) -> None:
    """By RFC 6901: the fragment is percent-decoded first, then split, then `~1` is replaced before `~0`."""
    assert resolve_reference(POINTED, reference) == value


@pytest.mark.parametrize("name", ["a/b", "a~1b", "~0", "~", "/", ""])
def test_escaped_names_are_found(name: str) -> None:
    assert resolve({name: name, "other": {}}, f"/{escape(name)}") == name


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"enum": [9]}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}, "tail": {}}, "required": ["tail", "kind"]}


def test_many_pointers_with_one_long_prefix_take_little_memory() -> None:
    """Pointers stored as strings would take a gigabyte."""
    deep: Any = {"properties": {"a" * 2**17: {"properties": {f"p{i}": {} for i in range(9000)}}}}
    assert len(list(keywords(deep))) == 2
    named: Any = {**CAT, "properties": {"kind": {"enum": [f"{i}" for i in range(9000)]}}}
    shared: Any = {"oneOf": [{"$ref": "#/$defs/a"}] * 9000, "$defs": {"a": named}}
    assert one_of_as_any_of(shared) is shared


def test_branches_with_a_discriminator_exclude_each_other() -> None:
    union: Any = {"oneOf": [CAT, {"$ref": "#/$defs/dog"}], "$defs": {"dog": DOG}}
    assert one_of_as_any_of(union) == {"anyOf": union["oneOf"], "$defs": {"dog": DOG}}
    pet = {"properties": {"pet": {"oneOf": union["oneOf"]}, "oneOf": {}}, "$defs": union["$defs"]}
    matcher = grammar(schema(pet)).begin()
    for token in ASCII.tokenize('{"pet": {"kind": "', special=False):
        matcher.accept_token(token)
    assert permitted(matcher) == {ord("c"), ord("d"), ord("w")}


@pytest.mark.parametrize(
    "branches",
    [
        [CAT, {**DOG, "required": ["tail"]}],
        [CAT, {**DOG, "type": ["object", "null"]}],
        [CAT, {**DOG, "properties": {"kind": {"enum": ["dog", "cat"]}}}],
        [CAT, {**DOG, "properties": {"kind": {"enum": ["dog", 3]}}}],
        [CAT, True],
        [],
    ],
)
def test_other_branches_may_overlap(branches: Any) -> None:
    assert one_of_as_any_of({"oneOf": branches}) == {"oneOf": branches}


def test_a_schema_cannot_make_the_compiler_lenient() -> None:
    with pytest.raises(GrammarError):
        grammar(schema({"x-guidance": {"lenient": True}, "uniqueItems": True, "type": "array"}))


# ── limits and cache ──


async def test_equal_specs_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "CACHED_GRAMMARS", 2)
    grammars = GrammarCompiler(ASCII)
    first = await grammars.compile(Regex("a"))
    assert await grammars.compile(Regex("a")) is first
    both = await asyncio.gather(*(grammars.compile(Regex("b")) for _ in range(4)))
    assert await grammars.compile(Regex("b")) in both
    await grammars.compile(Regex("a"))
    await grammars.compile(Regex("c"))
    assert await grammars.compile(Regex("a")) is first, "a was used after b"
    assert await grammars.compile(Regex("b")) not in both
    grammars.close()


def test_common_multiples_are_accepted() -> None:
    fields = {f"f{value}": {"type": "number", "multipleOf": value} for value in (0.01, 0.25, 5, 12, 15, 60, 86_400)}
    grammar(schema({"properties": fields}))


def test_multiples_of_several_schemas_count_together() -> None:
    with pytest.raises(GrammarError, match="multipleOf"):
        grammar(Lark('start: %json {"multipleOf": 509} %json {"multipleOf": 521}'))
    with pytest.raises(GrammarError):
        grammar(schema({"multipleOf": True}))


async def test_a_thread_that_cannot_start_fails_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    work = JobQueue[str]("test", 5.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        for key in (b"1", b"2", b"3"):
            with pytest.raises(RuntimeError, match="start"):
                await work.run(key, lambda: "done")
    assert await work.run(b"1", lambda: "done") == "done"


async def test_a_job_past_the_hard_limit_is_abandoned_and_others_run() -> None:
    work, go_on = JobQueue[str]("test", 0.02), threading.Event()

    def slow() -> str:
        go_on.wait(5)
        return "done"

    for each in range(jobs.MAX_THREADS // jobs.BUSY_THREADS - 1):
        keys = [bytes([each, number]) for number in range(jobs.BUSY_THREADS)]
        ends = await asyncio.gather(*(work.run(key, slow) for key in keys), return_exceptions=True)
        assert {type(end) for end in ends} == {JobTimeout}
        assert await work.run(b"quick", lambda: "done") == "done"
    with pytest.raises(JobTimeout):
        await asyncio.wait_for(work.run(keys[0], slow), 0.01)
    keys = [bytes([99, number]) for number in range(jobs.BUSY_THREADS)]
    await asyncio.gather(*(work.run(key, slow) for key in keys), return_exceptions=True)
    with pytest.raises(JobTimeout):
        await work.run(b"quick", lambda: "done")
    go_on.set()
    for thread in [each for each in threading.enumerate() if each.name == "test"]:
        thread.join()
    await asyncio.sleep(0)
    assert await work.run(keys[0], lambda: "again") == "again"


async def test_a_job_past_the_soft_limit_does_not_delay_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SOFT_LIMIT_SECONDS", 0.01)
    work, go_on = JobQueue[bool]("test", 5.0), threading.Event()
    slow = [asyncio.create_task(work.run(bytes([key]), lambda: go_on.wait(5))) for key in range(jobs.BUSY_THREADS)]
    await asyncio.sleep(0)
    assert await work.run(b"quick", go_on.is_set) is False
    go_on.set()
    assert await asyncio.gather(*slow) == [True] * jobs.BUSY_THREADS


async def test_jobs_without_a_caller_are_not_started() -> None:
    work, go_on, begun = JobQueue[None]("test", 5.0), threading.Event(), list[int]()
    first = [asyncio.create_task(work.run(bytes([key]), lambda: begun.append(go_on.wait(5)))) for key in range(2)]
    left = asyncio.create_task(work.run(b"left", lambda: begun.append(2)))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    go_on.set()
    await asyncio.gather(*first)
    await work.run(b"last", lambda: begun.append(3))
    assert begun == [True, True, 3]


async def test_a_slow_compilation_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "COMPILE_SECONDS", 0.0)
    grammars = GrammarCompiler(ASCII)
    with pytest.raises(GrammarError, match="was not compiled within 0 seconds"):
        await grammars.compile(Regex("a{3}"))
    grammars.close()


def test_matchers_are_independent() -> None:
    compiled = grammar(Regex("ab|cd"))
    one, other = compiled.begin(), compiled.begin()
    one.accept_token(ord("a"))
    assert permitted(other) == {ord("a"), ord("c")}
    assert permitted(one) == {ord("b")}
    with pytest.raises(GrammarError):
        one.accept_token(ord("a"))


async def test_an_exhausted_grammar_is_compiled_again() -> None:
    grammars = GrammarCompiler(ASCII)
    spec = Regex("[ab]{3}")
    first = await grammars.compile(spec)
    assert await grammars.compile(spec) is first
    (wrong,) = ASCII.tokenize("c", special=False)
    with pytest.raises(GrammarError):
        first.begin().accept_token(wrong)
    second = await grammars.compile(spec)
    assert second is not first
    assert await grammars.compile(spec) is second
    grammars.close()
