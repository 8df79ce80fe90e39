"""Workloads of the load tests. A workload yields sessions: requests that one client sends one after the other.

The same call always returns the same sessions in the same order. `python bench/models.py mt-bench`, `agents`,
`human-eval` and `bfcl` download the questions and recorded sessions; `context`, `shared` and `long` need no files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle, islice
from typing import Any

import msgspec
from msgspec import Struct

from bench import bfcl, prompts
from bench.client import chat, user
from bench.models import SOURCES

CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"

# Maximum characters of a recorded message: the longest message would fill a small context.
MESSAGE_CHARACTERS = 1500
# Maximum characters of a recorded session, some 1,500 tokens.
SESSION_CHARACTERS = 6000
# Approximate tokens of the system prompt of all requests of `shared`.
SYSTEM_TOKENS = 2000
# Approximate tokens of the long prompt of `long`; one request in LONG_EVERY has such a prompt.
LONG_TOKENS, LONG_EVERY = 4000, 8
# Tokens of the prompts of `context`, without the chat template.
PROMPT_TOKENS = 1000
# Tokens of a sentence of `context`, the full stop included.
SENTENCE_TOKENS = 12
# Upper bounds of the prompts in tokens, by workload; other prompts have at most SHORT_PROMPT_TOKENS.
LONGEST_PROMPT_TOKENS = {"agent": 3500, "shared": 2200, "long": 4400}
SHORT_PROMPT_TOKENS = 800

# Each of these words after a space is one token in the vocabularies of SmolLM2 and Qwen.
WORD_LIST = (
    "time people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service "
    "friend father power hour game line end member law car city community name team minute idea body level door "
    "office health person art war history party result change morning reason river stone garden winter summer light "
    "music paper table window bridge market field street north south east west green black white small large early "
    "young important public good find give tell feel become leave call keep begin show hear play run move live "
    "believe bring happen write provide the of and to in is that it was for on are with as at be this have from or "
    "had by not but what all were"
)
COMMON_WORDS = tuple(WORD_LIST.split())

_PASSAGE = "the keeper of the lighthouse wrote down every ship that passed in the night and what it carried "


class HttpRequest(Struct, frozen=True):
    """The path and the JSON body of a request."""

    path: str
    body: dict[str, Any]


# Requests that one client sends one after the other.
Session = Sequence[HttpRequest]


def text_of(tokens: int) -> str:
    """Returns English text of about `tokens` tokens."""
    return (_PASSAGE * (tokens // 18 + 1))[: int(tokens * 5.2)]


class Conversation(Struct):
    """A conversation of MT-bench; `turns` are its user messages."""

    question_id: int
    category: str
    turns: list[str]


class AgentSession(Struct):
    """A recorded session of a coding agent."""

    id: str
    messages: list[dict[str, Any]]


class AgentSessions(Struct):
    """The content of the file of recorded sessions."""

    cases: list[AgentSession]


TOPICS = ("the sea", "a clock", "the desert", "an orchestra", "a lighthouse", "snow", "a library", "bees")


def story(number: int, tokens: int, words: int = 20) -> HttpRequest:
    """Returns request `number`, with a prompt of about `words` words that no other number has."""
    rng = random.Random(number)
    topic, filler = TOPICS[number % len(TOPICS)], " ".join(rng.choice(TOPICS) for _ in range(words // 2))
    return HttpRequest(CHAT_PATH, chat(user(f"Story {number}: write about {topic}. {filler}"), tokens, seed=number))


def mt_bench(tokens: int) -> Iterator[Session]:
    """Yields MT-bench's first questions with the categories mixed. Answers have half to one and a half times `tokens`
    tokens, so that clients do not run in lockstep."""
    lines = SOURCES["mt-bench"].path.read_bytes().splitlines()
    conversations = [msgspec.json.decode(line, type=Conversation) for line in lines]
    rng = random.Random(0)
    rng.shuffle(conversations)
    for number, one in enumerate(cycle(conversations)):
        # From the second pass over the questions on, a leading number makes every prompt distinct.
        begin = f"{number // len(conversations) + 1}. " if number >= len(conversations) else ""
        length = rng.randint(tokens // 2, tokens + tokens // 2)
        yield [HttpRequest(CHAT_PATH, chat(user(begin + one.turns[0]), length, seed=number))]


def edit(tokens: int) -> Iterator[Session]:
    """Yields requests to rewrite a function with one small change."""
    for messages in cycle(prompts.edit(prompts.human_eval())):
        yield [HttpRequest(CHAT_PATH, chat(messages, tokens, temperature=0))]


def completion(tokens: int) -> Iterator[Session]:
    """Yields requests to complete the beginning of a function."""
    for text in cycle(prompts.completion(prompts.human_eval())):
        body = {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        yield [HttpRequest(COMPLETION_PATH, body)]


def agent(tokens: int) -> Iterator[Session]:
    """Yields recorded sessions: each request holds all earlier messages of its session, tool results included."""
    cases = msgspec.json.decode(SOURCES["agents"].path.read_bytes(), type=AgentSessions).cases
    for case in cycle(cases):
        if session := _turns(case, tokens):
            yield session


def _turns(case: AgentSession, tokens: int) -> list[HttpRequest]:
    """Returns a request for each user message in the first SESSION_CHARACTERS characters of a session."""
    requests: list[HttpRequest] = []
    messages: list[dict[str, str]] = []
    for message in case.messages:
        messages.append({"role": message["role"], "content": str(message["content"])[:MESSAGE_CHARACTERS]})
        if sum(len(one["content"]) for one in messages) > SESSION_CHARACTERS:
            break
        if message["role"] == "user":
            requests.append(HttpRequest(CHAT_PATH, chat([*messages], tokens)))
    return requests


def tools(tokens: int) -> Iterator[Session]:
    """Yields questions of the function calling leaderboard, each with its function. An answer has at most `tokens`
    tokens, since it may end earlier."""
    for number, one in enumerate(cycle(bfcl.questions("simple_python"))):
        offered = [function.tool for function in one.function or []]
        body = chat(one.question[0], tokens, seed=number, tools=offered, tool_choice="auto", ignore_eos=False)
        yield [HttpRequest(CHAT_PATH, body)]


def shared(tokens: int) -> Iterator[Session]:
    """Yields requests with one shared long system prompt, each with a short question of its own."""
    system = {"role": "system", "content": text_of(SYSTEM_TOKENS)}
    for number, question in enumerate(cycle(prompts.QUESTIONS)):
        yield [HttpRequest(CHAT_PATH, chat([system, *user(question)], tokens, seed=number))]


def long(tokens: int) -> Iterator[Session]:
    """Yields short prompts; every LONG_EVERY-th prompt is a distinct long one."""
    for number, question in enumerate(cycle(prompts.QUESTIONS)):
        text = f"Letter {number}. {text_of(LONG_TOKENS)}" if number % LONG_EVERY == LONG_EVERY - 1 else question
        yield [HttpRequest(CHAT_PATH, chat(user(text), tokens, seed=number))]


def context(tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> Iterator[Session]:
    """Yields requests with distinct prompts of `prompt_tokens` tokens that share only the chat template. Answers have
    exactly `tokens` tokens."""
    for number in count():
        yield [HttpRequest(CHAT_PATH, chat(user(random_text(number, prompt_tokens)), tokens, seed=number))]


def random_text(number: int, tokens: int) -> str:
    """Returns seeded random text of `tokens` tokens for vocabularies in which each of COMMON_WORDS is one token.

    The first two words differ between any two numbers below the square of the number of words.
    """
    rng = random.Random(number)
    first, second = number % len(COMMON_WORDS), number // len(COMMON_WORDS) % len(COMMON_WORDS)
    chosen = [COMMON_WORDS[first], COMMON_WORDS[second], *rng.choices(COMMON_WORDS, k=max(0, tokens - 2))][:tokens]
    sentences = (chosen[at : at + SENTENCE_TOKENS] for at in range(0, tokens, SENTENCE_TOKENS))
    # A full stop is a token too, so it replaces the last word of a whole sentence.
    return " ".join(" ".join(part[:-1]) + "." if len(part) == SENTENCE_TOKENS else " ".join(part) for part in sentences)


# Endless generators of sessions by name; the argument is the number of tokens of an answer.
WORKLOADS: dict[str, Callable[[int], Iterator[Session]]] = {
    "chat": mt_bench,
    "edit": edit,
    "completion": completion,
    "agent": agent,
    "tools": tools,
    "shared": shared,
    "long": long,
    "context": context,
}


def workload(name: str, sessions: int, tokens: int, skip: int = 0, prompt_tokens: int = PROMPT_TOKENS) -> list[Session]:
    """Returns `sessions` sessions of a workload after the first `skip`, with answers of `tokens` tokens.

    `prompt_tokens` is the length of the prompts of `context`; the other workloads have their own.
    """
    every = context(tokens, prompt_tokens) if name == "context" else WORKLOADS[name](tokens)
    return list(islice(every, skip, skip + sessions))


def slot_tokens(name: str, tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> int:
    """Returns the context of a slot, a multiple of 1,024 tokens, that every request of a workload fits into."""
    prompt = prompt_tokens + 100 if name == "context" else LONGEST_PROMPT_TOKENS.get(name, SHORT_PROMPT_TOKENS)
    return -(-(prompt + tokens + tokens // 2) // 1024) * 1024
