"""Forms become grammars, or are refused with the place that is wrong; masks permit what a grammar does."""

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
    Choice,
    Form,
    Gbnf,
    Grammar,
    GrammarError,
    Grammars,
    JsonObject,
    JsonSchema,
    Lark,
    Masks,
    Matcher,
    Regex,
    Want,
    compiler,
    jobs,
)
from engine.grammar.bridge import BLOCK, tokenizer
from engine.grammar.gbnf import lark_of
from engine.grammar.jobs import Jobs, Late
from engine.grammar.schema import DEPTH, depth_of, keywords, with_any_of
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
    masks.begin([Want(0, matcher, ())])
    permits = masks.of(0)
    assert permits is not None
    return set(np.flatnonzero(permits(0)).tolist())


def wander(made: Grammar, random: Random, most: int = 60) -> tuple[bytes, bool]:
    """A random text that the masks permit, and whether it came to its end."""
    matcher, said = made.begin(), bytearray()
    for _ in range(most):
        token = random.choice(sorted(permitted(matcher)))
        if token in ASCII.ends:
            return bytes(said), True
        said += ASCII.piece(token)
        matcher.take(token)
        if matcher.complete:
            return bytes(said), True
    return bytes(said), False


# ── forms ──


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (Regex("a{2,5}(b|true)"), "a{2,5}(b|true)"),
        (Choice(("yes", 'n"o', "never\n", "yes!")), 'yes|n"o|never\n|yes!'),
        (Gbnf('root ::= item ("," item)* "."\nitem ::= [a-c] [0-9]{2}'), r"[a-c]\d\d(,[a-c]\d\d)*\."),
        (Gbnf('root ::= start [\\u00e9-\\u00ef] "start"\nstart ::= "caf" # a start'), "caf[é-ï]start"),
        (Lark('start: "a" (B | "c")+ "."\nB: /b{2}/'), r"a(bb|c)+\."),
        (Lark('start: "call " %json {"enum": ["x", 3]}'), 'call ("x"|3)'),
        (schema({"enum": ["a", 1, None]}), '"a"|1|null'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_permitted_is_of_the_form(form: Form, pattern: str) -> None:
    made, ended = grammar(form), 0
    for seed in range(30):
        text, whole = wander(made, Random(seed))
        ended += whole
        assert not whole or re.fullmatch(pattern, text.decode())
    assert ended


@pytest.mark.parametrize("form", [schema(PERSON), JsonObject(), schema({"type": "array", "items": {"type": "number"}})])
def test_json_is_json(form: Form) -> None:
    ended = 0
    for seed in range(40):
        text, whole = wander(grammar(form), Random(seed), 300)
        if whole:
            json.loads(text)
            ended += 1
    assert ended


def test_what_a_schema_describes() -> None:
    matcher = grammar(schema(PERSON)).begin()
    for text in ('{"', "name", '":', ' "'):
        for token in ASCII.tokenize(text, special=False):
            assert token in permitted(matcher)
            matcher.take(token)
    assert not ASCII.ends & permitted(matcher)
    for token in ASCII.tokenize('Ann", "age": 7}', special=False):
        assert not matcher.complete
        matcher.take(token)
    assert matcher.complete


def test_it_may_end_exactly_where_the_grammar_may() -> None:
    matcher = grammar(Regex("a(aa)*")).begin()
    for _ in range(5):
        assert not ASCII.ends & permitted(matcher)
        matcher.take(ord("a"))
        assert permitted(matcher) == {ord("a"), *ASCII.ends}, "each of the tokens that end a text"
        matcher.take(ord("a"))


def test_where_nothing_can_follow_it_is_complete() -> None:
    matcher = grammar(Choice(("true",))).begin()
    matcher.take(ASCII.tokenize("true", special=False)[0])
    assert matcher.complete
    assert permitted(matcher) == ASCII.ends


def test_special_tokens_are_no_text_and_have_names() -> None:
    assert not permitted(grammar(Regex(r"(.|\n)*")).begin()) & {ASCII.call}
    matcher = grammar(Lark('start: /[ab]*/ (<|call|> "b")?')).begin()
    assert permitted(matcher) == {ord("a"), ord("b"), ASCII.call, *ASCII.ends}
    matcher.take(ASCII.call)
    assert permitted(matcher) == {ord("b")}
    text = grammar(Regex(r"<\|call\|>")).begin()
    assert permitted(text) == {ord("<")}, "spelled out, they are just letters"


def test_characters_of_several_tokens() -> None:
    matcher = grammar(Choice(("é!",))).begin()
    first, second, _ = range(ASCII.size - 6, ASCII.size - 3)
    assert permitted(matcher) == {first}
    matcher.take(first)
    assert permitted(matcher) == {second}


def test_the_bridge_has_every_token() -> None:
    known = tokenizer(ASCII)
    assert known.vocab_size == ASCII.size
    for token in range(ASCII.size):
        assert known.is_special_token(token) == (token in ASCII.special)
        if token not in ASCII.special and ASCII.piece(token) != b"\xff":
            assert known.decode_bytes([token]) == ASCII.piece(token)
    assert known.tokenize_str('{"name": true}') == ASCII.tokenize('{"name": true}', special=False)


def test_the_toy_has_a_bridge_too() -> None:
    matcher = grammar(Regex("(AB)+"), PAIRS).begin()
    assert matcher.permits(PAIRS.tokenize("ABABAB", special=False)) == 3
    assert matcher.permits([1, 2, 1, 1, 2]) == 3
    assert matcher.permits([1, 2, END]) == 2, "no row after an end would be used"


# ── guesses ──


def test_what_is_forced() -> None:
    assert grammar(schema(PERSON), ASCII).begin().forced(8) == [], "space may come first, or the bracket alone"
    matcher = grammar(Lark('start: "[name]" /[a-z]/ "true"')).begin()
    tokens = matcher.forced(8)
    assert tokens == ASCII.tokenize("[name]", special=False)
    assert matcher.forced(2) == tokens[:2]
    for token in tokens:
        assert permitted(matcher) == {token}, "though the word could be spelled by letters"
        matcher.take(token)
    assert matcher.forced(8) == []
    matcher.take(ord("x"))
    assert bytes_of(matcher.forced(8)) == b"true"
    matcher.take(*matcher.forced(8))
    assert matcher.forced(8) == []


class Spacious(AsciiVocab):
    """Puts a space before every text, as some do."""

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return super().tokenize(f" {text}", special=special)


@pytest.mark.parametrize("vocab", [AsciiVocab(), Spacious()], ids=lambda vocab: type(vocab).__name__)
def test_forced_texts_are_written_to_the_byte(vocab: AsciiVocab) -> None:
    """Also where the vocabulary writes texts otherwise, or knows none for them."""
    for text in ("name", ' "name"', "é!", "<|call|>", "x"):
        matcher = grammar(Choice((text,)), vocab).begin()
        assert bytes_of(matcher.forced(20)) == text.encode()


class Counting(AsciiVocab):
    """Knows what it was asked to tokenize."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        self.asked.append(text)
        return super().tokenize(text, special=special)


def test_a_long_forced_text_is_tokenized_in_parts_and_once() -> None:
    vocab, text = Counting(), "name true" * 1000
    matcher = grammar(Choice((text,)), vocab).begin()
    tokens = matcher.forced(10_000)
    assert bytes_of(tokens) == text.encode()
    assert max(map(len, vocab.asked)) <= BLOCK + 1
    rest = text.encode()
    for token in tokens[:20]:
        matcher.take(token)
        before = len(vocab.asked)
        rest = rest[len(vocab.piece(token)) :]
        assert bytes_of(matcher.forced(10_000)) == rest
        assert len(vocab.asked) <= before + 4


def test_masks_of_many_rows() -> None:
    """Each is that of a matcher that took the tokens."""
    form = grammar(schema(PERSON))
    texts = ('{"name": "x', "", '{\n "', '{"name": "abc", "age": 12')
    drafts = (' "y", "age"', '{"name"', "nam", "34}")
    masks, wants = Masks(ASCII.size), []
    for key, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
        matcher = form.begin()
        for token in ASCII.tokenize(text, special=False):
            matcher.take(token)
        tokens = ASCII.tokenize(draft, special=False)
        wants.append(Want(key, matcher, tokens[: matcher.permits(tokens)]))
    masks.begin(wants)
    assert masks.of(99) is None
    for want in wants:
        permits = masks.of(want.key)
        assert permits is not None
        for row in range(len(want.draft) + 1):
            assert set(np.flatnonzero(permits(row)).tolist()) == permitted(want.matcher)
            if row < len(want.draft):
                want.matcher.take(want.draft[row])


def test_masks_made_aside_are_the_same() -> None:
    form = grammar(Regex("[ab]{3}c"))
    near, aside = Masks(ASCII.size), Masks(ASCII.size, aside=True)
    for masks in (near, aside):
        masks.begin([Want(1, form.begin(), (ord("a"),))])
        masks.begin([Want(2, form.begin(), (ord("a"), ord("b")))])
    for row in range(3):
        here, there = near.of(2), aside.of(2)
        assert here is not None
        assert there is not None
        assert (here(row) == there(row)).all()
    aside.close()


# ── refusals ──


@pytest.mark.parametrize(
    ("wrong", "pointer"),
    [
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "/properties/a/uniqueItems"),
        ({"properties": {"not": {"not": {"type": "string"}}}}, "/properties/not/not"),
        ({"properties": {"a/b~": {"type": "string", "format": "no-such"}}}, "/properties/a~1b~0/format"),
        ({"items": {"type": "string", "pattern": "(?<=a)b"}}, "/items/pattern"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"if": {}}, "c": {"if": {}}}}, "/$defs/b/if"),
        ({"anyOf": [{"type": "string"}, {"propertyNames": {"minLength": 3}}]}, "/anyOf/1/propertyNames"),
        ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]}, "/oneOf"),
        ({"$ref": "#/$defs/nowhere"}, "/$ref"),
        ({"type": "strng"}, "/type"),
        ({"properties": {"a": {"$ref": "https://example.org/schema"}}}, "/properties/a/$ref"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_by_pointer(wrong: Any, pointer: str) -> None:
    with pytest.raises(GrammarError) as refusal:
        grammar(schema(wrong))
    assert refusal.value.pointer == pointer
    assert pointer in str(refusal.value)


@pytest.mark.parametrize(
    ("form", "says"),
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
        (Choice(()), "at least one"),
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
def test_what_cannot_be_used_is_refused(form: Form, says: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(says)):
        grammar(form)


@pytest.mark.parametrize(
    "text",
    [
        'root ::= item ("," item)* "."\nitem ::= [a-c] digit{2}\ndigit ::= [0-9]',
        'root ::= a-b | "x"\na-b ::= "(" root ")" | cD\ncD ::= e e\ne ::= "y" | e "z"\nf ::= cD',
    ],
)
def test_gbnf_is_what_the_converter_makes_of_it(text: str) -> None:
    assert lark_of(text).split() == gbnf_to_lark(text).split()


def test_comments_are_left_out() -> None:
    """The converter would copy all of them for each: seconds for as many as fit a form."""
    text = "# one\n" + "#\n" * 100_000 + 'root ::= "#" [#] # the last'
    assert lark_of(text).split() == ["%llguidance", "{}", "start:", '"#"', "/[#]/"]


def test_a_chain_of_rules_does_not_take_long() -> None:
    """The converter by itself would take minutes."""
    text = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(10_000)) + '\nr10000 ::= "a"'
    assert lark_of(text).endswith('R9999: R10000\nR10000: "a"\n')


@pytest.mark.parametrize("text", ["[)" * 100_000, '"' + '\\"' * 100_000], ids=["classes", "quotes"])
def test_what_is_not_closed_does_not_take_long(text: str) -> None:
    """To look for the end from each beginning would take minutes."""
    with pytest.raises(GrammarError, match="not valid GBNF"):
        lark_of(f"root ::= {text}")


def test_a_chain_of_as_many_rules_as_fit_a_form() -> None:
    """With too small a stack this would be the process's end."""
    text = "start: r0\n" + "\n".join(f"r{i:x}:r{i + 1:x}" for i in range(19_000)) + f'\nr{19_000:x}: "a"'
    assert 2**17 < len(text) < compiler.SIZE
    assert permitted(grammar(Lark(text)).begin()) == {ord("a")}


def test_a_deep_schema_is_refused_before_native_code_sees_it() -> None:
    deep: Any = {"type": "string"}
    for _ in range(DEPTH // 2 - 1):
        deep = {"properties": {"a": deep}}
    assert depth_of(deep) <= DEPTH
    grammar(schema(deep))
    with pytest.raises(GrammarError, match=f"at most {DEPTH}"):
        grammar(schema({"properties": {"a": {"properties": {"a": deep}}}}))


def test_keywords_are_no_names_of_properties() -> None:
    found = [place.pointer for place in keywords({"properties": {"not": {"enum": [{"if": 1}]}}, "$defs": {"x": {}}})]
    assert found == ["/properties", "/$defs", "/properties/not/enum"]


CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"enum": [9]}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}, "tail": {}}, "required": ["tail", "kind"]}


def test_many_pointers_with_one_long_beginning_take_no_room() -> None:
    """All of them together would be a gigabyte."""
    deep: Any = {"properties": {"a" * 2**17: {"properties": {f"p{i}": {} for i in range(9000)}}}}
    assert len(list(keywords(deep))) == 2
    named: Any = {**CAT, "properties": {"kind": {"enum": [f"{i}" for i in range(9000)]}}}
    shared: Any = {"oneOf": [{"$ref": "#/$defs/a"}] * 9000, "$defs": {"a": named}}
    assert with_any_of(shared) is shared


def test_branches_that_a_property_tells_apart_exclude_each_other() -> None:
    union: Any = {"oneOf": [CAT, {"$ref": "#/$defs/dog"}], "$defs": {"dog": DOG}}
    assert with_any_of(union) == {"anyOf": union["oneOf"], "$defs": {"dog": DOG}}
    pet = {"properties": {"pet": {"oneOf": union["oneOf"]}, "oneOf": {}}, "$defs": union["$defs"]}
    matcher = grammar(schema(pet)).begin()
    for token in ASCII.tokenize('{"pet": {"kind": "', special=False):
        matcher.take(token)
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
def test_other_branches_may_both_hold(branches: Any) -> None:
    assert with_any_of({"oneOf": branches}) == {"oneOf": branches}


def test_a_client_cannot_ask_to_be_lenient() -> None:
    with pytest.raises(GrammarError):
        grammar(schema({"x-guidance": {"lenient": True}, "uniqueItems": True, "type": "array"}))


# ── limits and what is kept ──


async def test_equal_forms_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "KEPT", 2)
    kept = Grammars(ASCII)
    first = await kept.compile(Regex("a"))
    assert await kept.compile(Regex("a")) is first
    both = await asyncio.gather(*(kept.compile(Regex("b")) for _ in range(4)))
    assert await kept.compile(Regex("b")) in both
    await kept.compile(Regex("a"))
    await kept.compile(Regex("c"))
    assert await kept.compile(Regex("a")) is first, "it was used after b"
    assert await kept.compile(Regex("b")) not in both
    kept.close()


def test_usual_multiples() -> None:
    fields = {f"f{value}": {"type": "number", "multipleOf": value} for value in (0.01, 0.25, 5, 12, 15, 60, 86_400)}
    grammar(schema({"properties": fields}))


def test_multiples_count_together_and_true_is_none() -> None:
    with pytest.raises(GrammarError, match="multipleOf"):
        grammar(Lark('start: %json {"multipleOf": 509} %json {"multipleOf": 521}'))
    with pytest.raises(GrammarError):
        grammar(schema({"multipleOf": True}))


async def test_a_thread_that_cannot_start_fails_its_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    work = Jobs[str]("test", 5.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        for key in (b"1", b"2", b"3"):
            with pytest.raises(RuntimeError, match="start"):
                await work.run(key, lambda: "done")
    assert await work.run(b"1", lambda: "done") == "done"


async def test_work_that_takes_too_long_is_given_up_and_others_go_on() -> None:
    work, go_on = Jobs[str]("test", 0.02), threading.Event()

    def slow() -> str:
        go_on.wait(5)
        return "done"

    for each in range(jobs.THREADS // jobs.AT_ONCE - 1):
        keys = [bytes([each, number]) for number in range(jobs.AT_ONCE)]
        ends = await asyncio.gather(*(work.run(key, slow) for key in keys), return_exceptions=True)
        assert {type(end) for end in ends} == {Late}
        assert await work.run(b"quick", lambda: "done") == "done"
    with pytest.raises(Late):
        await asyncio.wait_for(work.run(keys[0], slow), 0.01)
    keys = [bytes([99, number]) for number in range(jobs.AT_ONCE)]
    await asyncio.gather(*(work.run(key, slow) for key in keys), return_exceptions=True)
    with pytest.raises(Late):
        await work.run(b"quick", lambda: "done")
    go_on.set()
    for thread in [each for each in threading.enumerate() if each.name == "test"]:
        thread.join()
    await asyncio.sleep(0)
    assert await work.run(keys[0], lambda: "again") == "again"


async def test_long_work_does_not_hold_up_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LONG", 0.01)
    work, go_on = Jobs[bool]("test", 5.0), threading.Event()
    slow = [asyncio.create_task(work.run(bytes([key]), lambda: go_on.wait(5))) for key in range(jobs.AT_ONCE)]
    await asyncio.sleep(0)
    assert await work.run(b"quick", go_on.is_set) is False
    go_on.set()
    assert await asyncio.gather(*slow) == [True] * jobs.AT_ONCE


async def test_jobs_without_a_caller_are_not_begun() -> None:
    work, go_on, begun = Jobs[None]("test", 5.0), threading.Event(), list[int]()
    first = [asyncio.create_task(work.run(bytes([key]), lambda: begun.append(go_on.wait(5)))) for key in range(2)]
    left = asyncio.create_task(work.run(b"left", lambda: begun.append(2)))
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    go_on.set()
    await asyncio.gather(*first)
    await work.run(b"last", lambda: begun.append(3))
    assert begun == [True, True, 3]


async def test_a_job_that_takes_too_long_fails_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "SECONDS", 0.0)
    kept = Grammars(ASCII)
    with pytest.raises(GrammarError, match="was not compiled within 0 seconds"):
        await kept.compile(Regex("a{3}"))
    kept.close()


def test_matchers_do_not_know_of_each_other() -> None:
    made = grammar(Regex("ab|cd"))
    one, other = made.begin(), made.begin()
    one.take(ord("a"))
    assert permitted(other) == {ord("a"), ord("c")}
    assert permitted(one) == {ord("b")}
    with pytest.raises(GrammarError):
        one.take(ord("a"))


async def test_a_grammar_whose_states_are_spent_is_made_anew() -> None:
    made = Grammars(ASCII)
    form = Regex("[ab]{3}")
    first = await made.compile(form)
    assert await made.compile(form) is first
    (wrong,) = ASCII.tokenize("c", special=False)
    with pytest.raises(GrammarError):
        first.begin().take(wrong)
    second = await made.compile(form)
    assert second is not first
    assert await made.compile(form) is second
    made.close()
