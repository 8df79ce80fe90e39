"""A request with a grammar has the same tokens as alone, whatever the other requests and drafts; its output matches."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import pytest
from msgspec import structs

from engine.config import SpeculationConfig
from engine.contract import (
    PROPOSER_TYPES,
    Failed,
    Finished,
    FinishReason,
    Request,
    RequestRefused,
    SamplingParams,
    Speculation,
)
from engine.grammar import Gbnf, GrammarSpec, Lark, OneOfTexts, Regex
from engine.sequence import Sequence
from engine.speculate import Draft
from tests.engine.test_same_as_alone import IMAGES, CoreBench, Oracle, context_of, draw_request
from tests.engine.vocabularies import PAIRS, bytes_of, grammar
from tests.toy import END, VOCABULARY, ToyBackend, ToyContext

SPECS: list[tuple[GrammarSpec, str]] = [
    (Regex("(ABCD|EFGH)+"), "(ABCD|EFGH)+"),
    (Regex("[A-H]{3,30}"), "[A-H]{3,30}"),
    (Regex("AB(C|DE)*"), "AB(C|DE)*"),
    (OneOfTexts(("ABCDEFGH", "ABAB", "DEFGHABC")), "ABCDEFGH|ABAB|DEFGHABC"),
    (Gbnf('root ::= ("A" pair "GH")+\npair ::= "BC" | "D" [E-H]'), "(A(BC|D[E-H])GH)+"),
    (Lark('start: "AB" x{1,6}\nx: "CDEF" | "AACC"'), "AB(CDEF|AACC){1,6}"),
]


def pair_backend(context: ToyContext) -> Any:
    toy = ToyBackend(context)
    toy.vocab = PAIRS
    return toy


def alone(request: Request, cells: int = 300) -> tuple[list[int], FinishReason]:
    context = ToyContext(cells=cells)
    bench = CoreBench(context, slots=1, backend=pair_backend(context), media_bytes=0 if request.media else None)
    bench.submit(0, request)
    bench.run()
    bench.close()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    return bench.outputs[0], end.reason


def draw_constrained(random: Random, prefixes: list[list[int]]) -> tuple[Request, str]:
    spec, pattern = random.choice(SPECS)
    request = structs.replace(draw_request(random, prefixes, 60, IMAGES), grammar=grammar(spec, PAIRS))
    return structs.replace(request, max_tokens=random.choice([1, 10, 60])), pattern


@pytest.mark.parametrize("kind", [*PROPOSER_TYPES, "auto", "fixed", "oracle"])
@pytest.mark.parametrize("seed", [4, 5, 9, 12])
def test_tokens_are_those_alone_and_follow_the_grammar(kind: Any, seed: int) -> None:
    random = Random(seed)
    order: Any = "measured" if kind == "auto" else "fixed"
    types: Any = ("auto",) if kind == "fixed" else (kind,)
    speculation = SpeculationConfig(
        types=types, order=order, size_n=2, size_m=5, mod_match=2, mod_min=1, suffix_tokens=100
    )
    mtp = kind == "draft-mtp"
    cells, rows, outputs = random.choice([120, 300]), random.choice([16, 64]), random.choice([8, 16])
    context = context_of(seed % 2 == 0, cells, rows=rows, outputs=outputs, head=mtp)
    bench = CoreBench(
        context,
        prompt_rows=random.choice([1, 5, 100]),
        speculation=None if kind == "oracle" else speculation,
        draft=None if mtp else ToyContext(cells=200, other=0.3),
        backend=pair_backend(context),
        media_bytes=400,
        mtp=mtp,
    )
    prefixes = [[random.randrange(1, VOCABULARY) for _ in range(20)] for _ in range(2)]
    expected: dict[int, tuple[list[int], FinishReason]] = {}
    for key in range(10):
        request, pattern = draw_constrained(random, prefixes)
        request = structs.replace(request, stop_tokens=request.stop_tokens if seed >= 6 else ())
        if key % 3 == 2:
            request, pattern = structs.replace(request, grammar=None), ".*"
        tokens, reason = expected[key] = alone(request)
        if reason is FinishReason.STOP and request.stop_tokens == () and key % 3 != 2:
            assert re.fullmatch(pattern, bytes_of(tokens, PAIRS).decode())
        if kind in ("prediction", "auto", "fixed"):
            request = structs.replace(request, prediction=tuple(t if random.random() < 0.8 else 7 for t in tokens))
        oracle = Oracle(request, tokens, 0.3, random) if kind == "oracle" else None
        bench.submit(key, request, oracle)
        for _ in range(random.randint(0, 6)):
            bench.core.step()
            bench.check()
        if bench.core.running and random.random() < 0.3:
            bench.core.lifecycle.preempt(random.choice(list(bench.core.running.values())))
    bench.run()
    bench.close()
    ends = {key: end.reason for key, end in bench.ends.items() if isinstance(end, Finished)}
    assert {key: (bench.outputs[key], ends[key]) for key in ends} == expected
    assert any(drafts.drafted for drafts in bench.speculative_decoding.draft_stats)
    for drafts in bench.speculative_decoding.draft_stats:
        accepted = drafts.drafted == drafts.accepted
        assert drafts.type != "grammar" or seed >= 6 or accepted, "forced tokens before a stop token are accepted"


def run_one(request: Request, **options: Any) -> tuple[str, Finished]:
    context = ToyContext(cells=300)
    bench = CoreBench(context, backend=pair_backend(context), **options)
    bench.submit(0, request)
    bench.run()
    end = bench.ends[0]
    assert isinstance(end, Finished), end
    return bytes_of(bench.outputs[0], PAIRS).decode(), end


def request_of(spec: GrammarSpec, **options: Any) -> Request:
    return Request(prompt=(1, 2, 3), grammar=grammar(spec, PAIRS), **options)


def test_a_complete_output_ends_by_itself() -> None:
    text, end = run_one(request_of(OneOfTexts(("ABCD",)), max_tokens=9))
    assert text == "ABCD"
    assert (end.reason, end.stop) == (FinishReason.STOP, None)
    assert end.usage.completion <= 4, "no end token was needed"
    text, end = run_one(request_of(OneOfTexts(("ABCD",)), max_tokens=end.usage.completion))
    assert (text, end.reason) == ("ABCD", FinishReason.STOP), "the output ends with its last token"


def test_an_output_that_may_continue_ends_by_an_end_token() -> None:
    likely = SamplingParams(temperature=0.0, logit_bias=((END, 50.0),))
    text, end = run_one(request_of(Regex("AB*"), max_tokens=40, sampling=likely))
    assert text in ("A", "AB"), "one token"
    assert (end.reason, end.stop, end.usage.completion) == (FinishReason.STOP, END, 2)


def test_an_empty_output() -> None:
    text, end = run_one(request_of(Regex("(ABCD)?"), sampling=SamplingParams(logit_bias=((END, 50.0),))))
    assert (text, end.reason) == ("", FinishReason.STOP)


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_eos": True, "min_tokens": 30},
        {"min_tokens": 30, "stop_tokens": (1, 2)},
        {"sampling": SamplingParams(logit_bias=tuple((t, float("-inf")) for t in range(VOCABULARY)))},
        {"sampling": SamplingParams(logit_bias=tuple((t, -1e9) for t in range(VOCABULARY)), top_k=1)},
        {"sampling": SamplingParams(repeat_penalty=100.0, presence_penalty=100.0, dry_multiplier=100.0)},
        {"sampling": SamplingParams(temperature=0.0, xtc_probability=1.0, xtc_threshold=0.01, typical_p=0.1)},
    ],
)
def test_the_grammar_overrides_bans(options: Any) -> None:
    text, end = run_one(request_of(Lark('start: "AB" "CDEF"{2}'), max_tokens=60, **options))
    assert end.reason is FinishReason.STOP
    assert "ABCDEFCDEF".startswith(text) if "stop_tokens" in options else text == "ABCDEFCDEF"


def test_bans_apply_where_the_grammar_permits_other_tokens() -> None:
    banned = SamplingParams(temperature=1.0, logit_bias=((2, float("-inf")), (41, float("-inf"))))
    for seed in range(5):
        text, _ = run_one(request_of(Regex("[ABC]{10}"), sampling=structs.replace(banned, seed=seed), ignore_eos=True))
        assert len(text) == 10
        assert not re.search("(?<!A)(?<!B)B(?!C)", text), "B is only part of tokens that are not banned"


def test_logprobs_are_of_the_raw_logits() -> None:
    free = Request(prompt=(1, 2, 3), max_tokens=1, logprobs=3, sampling=SamplingParams(temperature=0.0))
    context = ToyContext(cells=300)
    bench = CoreBench(context, backend=pair_backend(context))
    found: dict[int, Any] = {}
    inner = bench.deliver

    def deliver(items: Any) -> None:
        found.update({key: logprobs[0] for key, _, logprobs, *_ in items if logprobs})
        inner(items)

    bench.core._outbox._deliver = deliver
    bench.submit(0, free)
    bench.submit(1, structs.replace(free, grammar=grammar(OneOfTexts(("GH",)), PAIRS)))
    bench.run()
    assert found[0].top == found[1].top, "the grammar permits other tokens"
    assert found[1].token != found[0].token
    assert found[1].logprob < found[0].logprob


def test_forced_tokens_save_steps() -> None:
    spec = Lark('start: "ABCDEFGHAACC" /[AB]/')
    context = ToyContext(cells=300)
    bench = CoreBench(
        context, backend=pair_backend(context), speculation=SpeculationConfig(types=("grammar",), order="fixed")
    )
    greedy = SamplingParams(temperature=0.0, logit_bias=tuple((t, 30.0) for t in range(41, VOCABULARY)))
    bench.submit(0, request_of(spec, sampling=greedy))
    bench.run()
    end = bench.ends[0]
    assert isinstance(end, Finished)
    assert end.usage.accepted == end.usage.drafted > 3
    assert context.decodes < end.usage.completion


def test_a_grammar_survives_a_context_shift() -> None:
    """A context shift discards tokens of the history, not of the output."""
    context = ToyContext(cells=300)
    bench = CoreBench(context, backend=pair_backend(context))
    request = request_of(Regex("(ABCDEFGH)+"), max_tokens=100, ignore_eos=True)
    sequence = Sequence(0, request, 5, PAIRS, 20, 2)
    bench.outputs[0], bench.sequences[0] = [], sequence
    bench.core.lifecycle.submit(sequence)
    bench.run()
    text = bytes_of(bench.outputs[0], PAIRS).decode()
    assert sequence.discarded > 20
    assert ("ABCDEFGH" * 30).startswith(text)


class RepeatedDraft(Oracle):
    """Drafts the same tokens at every step."""

    def propose(self, limit: int) -> Draft:
        return Draft(self.truth[:limit])


@pytest.mark.parametrize("drafted", [False, True])
def test_a_grammar_that_cannot_be_followed_fails_its_request_alone(drafted: bool) -> None:
    """No token continues the output with `[xyz]`. Tokens picked before the failure are emitted, also those of its
    step."""
    context = ToyContext(cells=300)
    bench = CoreBench(context, backend=pair_backend(context))
    likely = SamplingParams(temperature=0.0, logit_bias=((41, 50.0),))
    request = request_of(Regex("(AB){3}[xyz]"), sampling=likely, logprobs=0, speculation=Speculation(order="fixed"))
    bench.submit(0, request, RepeatedDraft(request, [41, 41], 0.0, Random(0)) if drafted else None)
    bench.submit(1, Request(prompt=(4, 5), max_tokens=5, ignore_eos=True))
    bench.run()
    assert bytes_of(bench.outputs[0], PAIRS) == b"ABABAB"
    assert isinstance(bench.ends[0], Failed)
    assert isinstance(bench.ends[0].error, RequestRefused)
    assert isinstance(bench.ends[1], Finished)
    assert len(bench.outputs[1]) == 5
    assert bench.core.counters.completion_tokens == 8


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_draft_that_cannot_be_continued_changes_nothing(offloaded: bool) -> None:
    """No token is a letter of `[xyz]`, so no token can follow AB; the request itself never picks AB."""
    likely = SamplingParams(temperature=0.0, logit_bias=((1, 80.0), (3, 50.0), (4, 50.0)))
    request = request_of(Regex("(A(B[xyz]|CD)){3}"), sampling=likely, speculation=Speculation(order="fixed"))
    assert run_one(request)[0] == "ACDACDACD"
    context = ToyContext(cells=300)
    toy = pair_backend(context)
    toy.info = structs.replace(toy.info, offloaded=offloaded)
    bench = CoreBench(context, backend=toy)
    drafted: list[int] = []
    bench.submit(0, request, RepeatedDraft(request, [2, 8], 0.0, Random(0)))
    while bench.core.lifecycle.busy:
        drafted += bench.sequences[0].draft
        bench.core.step()
    assert bytes_of(bench.outputs[0], PAIRS) == b"ACDACDACD"
    assert drafted == [2, 2, 2], "the draft was verified and rejected"
    bench.core.close()


@pytest.mark.parametrize("rule", ["x[max_tokens=3]: /[AB]+/", 'x[stop="C"]: /[AB]+/', "x[lazy]: /[AB]+C/"])
@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_rules_without_rollback_have_drafts_too(rule: str, wrong: float) -> None:
    """llguidance cannot roll back in a rule with `max_tokens` or `stop`."""
    for seed in range(6):
        likely = SamplingParams(temperature=1.0, seed=seed)
        spec = Lark(f'start: (x "D")+ "E"\n{rule}')
        request = request_of(spec, sampling=likely, max_tokens=40, speculation=Speculation(order="fixed"))
        tokens, reason = alone(request)
        bench = CoreBench(context := ToyContext(cells=300), backend=pair_backend(context))
        bench.submit(0, request, Oracle(request, tokens, wrong, Random(seed)))
        bench.run()
        end = bench.ends[0]
        assert isinstance(end, Finished), end
        assert (bench.outputs[0], end.reason) == (tokens, reason)
