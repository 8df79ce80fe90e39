"""POST /tokenize and /detokenize, in llama-server's and in vLLM's shape, and POST /apply-template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct
from starlette.requests import Request
from starlette.responses import Response

from api.generation.choices import asked_in, asked_of
from api.generation.loaded_model import Served, Site
from api.generation.turns import turn_of
from api.http.request_body import read
from api.http.responses import JSONReply
from api.schema.requests import ChatRequest, Count, decode
from api.templates.prompts import Prompts, aside, each_of
from engine import RequestRefused

MOST = 2**20
"""Tokens that are spelled for one request, or texts and tokens that one holds."""


class Shape(Struct):
    """What tells whose request it is; null is the same as absent."""

    content: Raw = Raw(b"null")
    prompt: Raw = Raw(b"null")
    messages: Raw = Raw(b"null")


class PiecesRequest(Struct):
    """llama-server's POST /tokenize."""

    content: str | Annotated[list[str | int], Meta(max_length=MOST)]
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class TextTokens(Struct):
    """vLLM's POST /tokenize of a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class ChatTokens(ChatRequest, kw_only=True):
    """vLLM's POST /tokenize of a conversation."""

    return_token_strs: bool | None = None


class TokensRequest(Struct):
    """POST /detokenize."""

    tokens: Annotated[list[Count], Meta(max_length=MOST)]
    model: str | None = None


class Piece(Struct, frozen=True):
    """A token and its text, or its bytes if they are no whole characters."""

    id: int
    piece: str | list[int]


class PiecesReply(Struct, frozen=True):
    """What llama-server's clients get."""

    tokens: list[int] | list[Piece]


class CountReply(Struct, frozen=True):
    """What vLLM's clients get."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextReply(Struct, frozen=True):
    """The text of tokens, under llama-server's name and vLLM's."""

    content: str
    prompt: str


class PromptReply(Struct, frozen=True):
    """A conversation as the model reads it."""

    prompt: str


_SHAPE = msgspec.json.Decoder(Shape)
_PIECES = msgspec.json.Decoder(PiecesRequest)
_TEXT = msgspec.json.Decoder(TextTokens)
_CHAT = msgspec.json.Decoder(ChatTokens)
_TOKENS = msgspec.json.Decoder(TokensRequest)
_CONVERSATION = msgspec.json.Decoder(ChatRequest)


class Tokens:
    """The endpoints."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def tokenize(self, request: Request) -> Response:
        """The tokens of `content`, as llama-server, or of `prompt` or `messages`, as vLLM."""
        served = self._site.open
        body = await read(request, served.options.server.max_body)
        shape = decode(_SHAPE, body)
        if bytes(shape.content) != b"null":
            return JSONReply(await _pieces(served, decode(_PIECES, body)))
        if bytes(shape.messages) != b"null":
            chat = asked_in(body, served, _CHAT)
            turn = await turn_of(chat, served.prompts)
            return JSONReply(await _counted(served, turn.prompt, chat.return_token_strs))
        if bytes(shape.prompt) != b"null":
            text = decode(_TEXT, body)
            served.check_model(text.model)
            tokens = await _tokens_of(served, text)
            return JSONReply(await _counted(served, tokens, text.return_token_strs))
        raise RequestRefused("Send content, as to llama-server, or prompt or messages, as to vLLM.", field="content")

    async def detokenize(self, request: Request) -> Response:
        """The text of `tokens`, special ones by their names."""
        served = self._site.open
        asked = decode(_TOKENS, await read(request, served.options.server.max_body))
        served.check_model(asked.model)
        _check(served, asked.tokens, "tokens")
        text = await aside(served.prompts.text_with_names_of, asked.tokens)
        return JSONReply(TextReply(text, text))

    async def apply_template(self, request: Request) -> Response:
        """The conversation as the model reads it, to send as a prompt."""
        served = self._site.open
        asked = await asked_of(request, served, _CONVERSATION)
        return JSONReply(PromptReply((await turn_of(asked, served.prompts)).text))


async def _tokens_of(served: Served, asked: TextTokens) -> tuple[int, ...]:
    """The tokens that a completion of the text would have, unless asked for without those that the model adds."""
    if asked.add_special_tokens is False or not asked.prompt:
        return tuple(await served.prompts.of_piece(asked.prompt, add=asked.add_special_tokens is not False, parse=True))
    return await served.prompts.of_text(asked.prompt)


async def _counted(served: Served, tokens: tuple[int, ...], spelled: bool | None) -> CountReply:
    strings = None
    if spelled:
        _check(served, tokens, "return_token_strs")
        strings = await aside(partial(each_of, function=served.engine.vocab.text), tokens)
    return CountReply(len(tokens), served.engine.request_limit, list(tokens), strings)


async def _pieces(served: Served, asked: PiecesRequest) -> PiecesReply:
    """The tokens of a text, or of texts and tokens by turns: what the model adds goes around the first piece."""
    content, prompts = asked.content, served.prompts
    add, parse = bool(asked.add_special), asked.parse_special is not False
    if isinstance(content, str):
        tokens = await prompts.of_piece(content, add=add, parse=parse)
    else:
        tokens = await prompts.of_pieces(content, add=add, parse=parse)
    if not asked.with_pieces:
        return PiecesReply(tokens)
    _check(served, tokens, "content")
    return PiecesReply(await aside(partial(each_of, function=partial(_piece, prompts)), tokens))


def _check(served: Served, tokens: Sequence[int], field: str) -> None:
    """Raises RequestRefused for tokens that cannot be spelled: what is none, and too many of them."""
    size = served.engine.vocab.size
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        raise RequestRefused(f"{field} holds a token id outside 0..{size - 1}.", field=field)
    if len(tokens) > MOST:
        raise RequestRefused(f"These are {len(tokens)} tokens; at most {MOST} are spelled.", field=field)


def _piece(prompts: Prompts, token: int) -> Piece:
    spelled = prompts.spelled(token)
    try:
        return Piece(token, spelled.decode())
    except UnicodeDecodeError:
        return Piece(token, list(spelled))
