"""What clients ask in load tests, over HTTP: sessions of requests, each sent when the one before was answered.

The same call always returns the same sessions in the same order. Questions and recorded sessions are read from files
that `python bench/models.py mt-bench`, `agents`, `human-eval` and `bfcl` bring.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import msgspec
from msgspec import Struct

from bench import bfcl, prompts
from bench.client import chat, user
from bench.models import SOURCES

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

MESSAGE = 1500
"""Characters of a recorded message at most: the longest alone would fill a small context."""
CONTEXT = 6000
"""Characters of a recorded session at most, some 1,500 tokens."""
SYSTEM = 2000
"""Tokens, about, of a system prompt that all share."""
LONG, EVERY = 4000, 8
"""Tokens, about, of the long prompt that one request of so many has."""

WORDS = "the keeper of the lighthouse wrote down every ship that passed in the night and what it carried "


class Asked(Struct, frozen=True):
    """One request."""

    path: str
    body: dict[str, Any]


Session = Sequence[Asked]
"""Requests that one client sends one after the other."""


def text_of(tokens: int) -> str:
    """English text of about so many tokens."""
    return (WORDS * (tokens // 18 + 1))[: int(tokens * 5.2)]


class Conversation(Struct):
    """One of MT-bench's."""

    question_id: int
    category: str
    turns: list[str]


class Recorded(Struct):
    """One agent's session."""

    id: str
    messages: list[dict[str, Any]]


class Recordings(Struct):
    """The file of them."""

    cases: list[Recorded]


TOPICS = ("the sea", "a clock", "the desert", "an orchestra", "a lighthouse", "snow", "a library", "bees")


def story(number: int, tokens: int, words: int = 20) -> Asked:
    """A request of its own for each number, its prompt of about so many words, of which no file is needed."""
    rng = random.Random(number)
    topic, filler = TOPICS[number % len(TOPICS)], " ".join(rng.choice(TOPICS) for _ in range(words // 2))
    return Asked(CHAT, chat(user(f"Story {number}: write about {topic}. {filler}"), tokens, seed=number))


def mt_bench(tokens: int) -> Iterator[Session]:
    """MT-bench's first questions, in an order that mixes the categories; answers of half to one and a half times so
    many tokens, so that clients do not keep step."""
    lines = SOURCES["mt-bench"].path.read_bytes().splitlines()
    asked = [msgspec.json.decode(line, type=Conversation) for line in lines]
    rng = random.Random(0)
    rng.shuffle(asked)
    for number, one in enumerate(cycle(asked)):
        begin = f"{number // len(asked) + 1}. " if number >= len(asked) else ""  # none is asked twice
        length = rng.randint(tokens // 2, tokens + tokens // 2)
        yield [Asked(CHAT, chat(user(begin + one.turns[0]), length, seed=number))]


def edit(tokens: int) -> Iterator[Session]:
    """Rewrite a function with one small change."""
    for messages in cycle(prompts.edit(prompts.human_eval())):
        yield [Asked(CHAT, chat(messages, tokens, temperature=0))]


def completion(tokens: int) -> Iterator[Session]:
    """Go on with the beginning of a function."""
    for text in cycle(prompts.completion(prompts.human_eval())):
        body = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        yield [Asked(TEXT, body)]


def agent(tokens: int) -> Iterator[Session]:
    """Recorded sessions: each request holds all messages before it, tools' answers included."""
    cases = msgspec.json.decode(SOURCES["agents"].path.read_bytes(), type=Recordings).cases
    for case in cycle(cases):
        if session := _turns(case, tokens):
            yield session


def _turns(case: Recorded, tokens: int) -> list[Asked]:
    """A request for each of its messages that somebody answers, as far as the context goes."""
    asked: list[Asked] = []
    messages: list[dict[str, str]] = []
    for message in case.messages:
        messages.append({"role": message["role"], "content": str(message["content"])[:MESSAGE]})
        if sum(len(one["content"]) for one in messages) > CONTEXT:
            break
        if message["role"] == "user":
            asked.append(Asked(CHAT, chat([*messages], tokens)))
    return asked


def tools(tokens: int) -> Iterator[Session]:
    """Questions of the function calling leaderboard, each with the function that it may call. Here an answer has at
    most so many tokens: a call ends where it is whole."""
    for number, one in enumerate(cycle(bfcl.questions("simple_python"))):
        offered = [function.tool for function in one.function or []]
        body = chat(one.question[0], tokens, seed=number, tools=offered, tool_choice="auto", ignore_eos=False)
        yield [Asked(CHAT, body)]


def shared(tokens: int) -> Iterator[Session]:
    """One long system prompt before a short question each."""
    system = {"role": "system", "content": text_of(SYSTEM)}
    for number, question in enumerate(cycle(prompts.QUESTIONS)):
        yield [Asked(CHAT, chat([system, *user(question)], tokens, seed=number))]


def long(tokens: int) -> Iterator[Session]:
    """A long prompt now and then among short ones; no two alike."""
    for number, question in enumerate(cycle(prompts.QUESTIONS)):
        text = f"Letter {number}. {text_of(LONG)}" if number % EVERY == EVERY - 1 else question
        yield [Asked(CHAT, chat(user(text), tokens, seed=number))]


WORKLOADS: dict[str, Callable[[int], Iterator[Session]]] = {
    "chat": mt_bench,
    "edit": edit,
    "completion": completion,
    "agent": agent,
    "tools": tools,
    "shared": shared,
    "long": long,
}
"""By name, without end."""


def workload(name: str, sessions: int, tokens: int, skip: int = 0) -> list[Session]:
    """So many sessions of a workload after the first `skip`, with answers of `tokens` tokens."""
    return list(islice(WORKLOADS[name](tokens), skip, skip + sessions))
