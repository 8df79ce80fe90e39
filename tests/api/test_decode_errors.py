"""Every kind of msgspec's validation errors becomes a sentence with the field, the expected and the given value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import UNSET, Meta, Struct

from api.http.decode_errors import as_refusal, choices_hint, nearest_hint


class Inner(Struct, forbid_unknown_fields=True):
    name: str


class Body(Struct, kw_only=True):
    required: int
    any: bool | None = None
    share: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    open: Annotated[float, Meta(gt=0.0, lt=2.0)] = 1.0
    most: Annotated[int, Meta(le=5)] = 0
    even: Annotated[int, Meta(multiple_of=2)] = 0
    count: Annotated[int, Meta(ge=-1, le=2**53)] = 0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0
    word: Annotated[str, Meta(min_length=1)] = "a"
    named: Annotated[str, Meta(pattern="^a")] = "a"
    items: str | Annotated[list[int], Meta(max_length=2)] = ""
    pairs: list[tuple[str, float]] = []
    few: Annotated[tuple[int, ...], Meta(min_length=1, max_length=2)] = (1,)
    kind: Literal["x", "y"] = "x"
    only: Literal["x"] = "x"
    weights: dict[str, Annotated[float, Meta(ge=0.0)]] = {}
    by_token: dict[int, float] = {}
    bounded: Annotated[dict[str, int], Meta(max_length=1)] = {}
    inner: Inner | None = None
    inners: list[Inner] = []

    def __post_init__(self) -> None:
        if self.required == 13:
            raise ValueError("the number is unlucky")


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ("{}", "required", "required: the field is missing; expected a whole number"),
        ('{"required": null}', "required", "required: expected a whole number, not null"),
        ('{"required": 1.5}', "required", "required: expected a whole number, not 1.5"),
        ('{"required": 13}', None, "the number is unlucky"),
        ('{"any": "yes"}', "any", "any: expected true or false, not 'yes'"),
        ('{"share": -1}', "share", "share: expected a number from 0 to 1, not -1"),
        ('{"share": 1e400}', "share", "share: expected a number from 0 to 1"),
        ('{"open": 0}', "open", "open: expected a number above 0 and below 2, not 0"),
        ('{"most": 6}', "most", "most: expected a whole number of at most 5, not 6"),
        ('{"even": 1}', "even", "even: expected a whole number that is a multiple of 2, not 1"),
        ('{"count": -2}', "count", "count: expected a whole number from -1 to 2^53, not -2"),
        (f'{{"seed": {2**63}}}', "seed", f"seed: expected a whole number from -2^63 to 2^63 - 1, not {2**63}"),
        (
            f'{{"count": 1{"0" * 100}}}',
            "count",
            "count: expected a whole number from -1 to 2^53, not a far larger number",
        ),
        ('{"word": ""}', "word", "word: expected a string of at least 1 character, not ''"),
        ('{"named": "b"}', "named", "named: expected a string that matches the regular expression ^a, not 'b'"),
        (
            '{"items": [1, 2, 3]}',
            "items",
            "items: expected a string or a list of at most 2 items, not a list of 3 items",
        ),
        ('{"items": ["x"]}', "items[0]", "items[0]: expected a whole number, not 'x'"),
        ('{"pairs": [["a"]]}', "pairs[0]", "pairs[0]: expected a list of 2 items, not a list of 1 item"),
        ('{"pairs": [["a", {}]]}', "pairs[0][1]", "pairs[0][1]: expected a number, not an object"),
        ('{"few": []}', "few", "few: expected a list of 1 to 2 items, not a list of 0 items"),
        ('{"kind": "z"}', "kind", "kind: expected one of x, y, not 'z'"),
        ('{"kind": 5}', "kind", "kind: expected one of x, y, not 5"),
        ('{"only": "z"}', "only", "only: expected 'x', not 'z'"),
        ('{"weights": {"a": -1}}', "weights[...]", "weights[...]: expected a number of at least 0"),
        ('{"weights": {"a": "b"}}', "weights[...]", "weights[...]: expected a number of at least 0, not a string"),
        ('{"by_token": {"a": 1}}', "by_token", "by_token: each key must be a whole number"),
        ('{"bounded": {"a": 1, "b": 1}}', "bounded", "bounded: expected an object of at most 1 fields, not an object"),
        ('{"inner": []}', "inner", "inner: expected an object, not a list of 0 items"),
        ('{"inner": {}}', "inner.name", "inner.name: the field is missing; expected a string"),
        ('{"inners": [{"nam": 1}]}', "inners[0].nam", "inners[0].nam: there is no such field; the nearest is name"),
        ('{"inners": [{"` - at `$.x": 1}]}', "inners[0].` - at `$.x", "inners[0].` - at `$.x: there is no such field"),
        ("[]", None, "body: expected an object, not a list of 0 items"),
        ("null", None, "body: expected an object, not null"),
        ('{"any": "' + "x" * 100 + '"}', "any", "any: expected true or false, not a string of 100 characters"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_every_kind(body: str, field: str | None, message: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(body, type=Body)
    given: Any = UNSET if "e400" in body else msgspec.json.decode(body)
    refusal = as_refusal(caught.value, Body, given)
    assert (refusal.field, str(refusal)) == (field, message)


@pytest.mark.parametrize(
    ("given", "field", "message"),
    [
        ([{}], "tools[0].name", "tools[0].name: the field is missing; expected a string"),
        ([{"name": 1}], "tools[0].name", "tools[0].name: expected a string, not 1"),
        ({}, "tools", "tools: expected a list, not an object"),
    ],
)
def test_the_path_of_a_part_of_a_body(given: object, field: str, message: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(given, list[Inner])
    refusal = as_refusal(caught.value, list[Inner], given, "tools")
    assert (refusal.field, str(refusal)) == (field, message)


def test_a_value_that_is_not_known() -> None:
    error = msgspec.ValidationError("Expected `int`, got `array` - at `$.required`")
    assert str(as_refusal(error, Body, UNSET)) == "required: expected a whole number, not a list"


def test_hints() -> None:
    assert nearest_hint("--foo", ["--fit"]) == nearest_hint("nix", ["granite"]) == ""
    assert nearest_hint("--paralel", ["--parallel"]) == "; the nearest is --parallel"
    assert choices_hint("nix", ["a", "granite"]) == "; expected one of a, granite"
    assert choices_hint("granit", ["a", "granite"]) == "; the nearest is granite"
