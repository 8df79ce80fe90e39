"""POST /tokenize and /detokenize, in llama-server's and in vLLM's shapes, and POST /apply-template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct
from starlette.requests import Request
from starlette.responses import Response

from api.generation.choices import parse_any_generation_request, read_generation_request
from api.generation.loaded_model import AppState, LoadedModel
from api.generation.prepared_chat import prepare_chat
from api.http.request_body import read_body
from api.http.responses import JSONResponse
from api.schema.request_values import NonNegativeInt
from api.schema.requests import ChatRequest, decode_any_body
from api.templates.prompts import PromptRenderer
from api.templates.text_tokens import map_distinct, run_long_in_thread
from engine import RequestRefused

# Maximum tokens of one request that are converted to text. Also the maximum length of a request's list.
MAX_DETOKENIZED_TOKENS = 2**20


class _BodyKind(Struct):
    """The fields by which the request shapes of /tokenize are distinguished. Null counts as absent."""

    content: Raw = Raw(b"null")
    prompt: Raw = Raw(b"null")
    messages: Raw = Raw(b"null")


class LlamaTokenizeRequest(Struct):
    """Request body of /tokenize in llama-server's shape."""

    content: str | Annotated[list[str | int], Meta(max_length=MAX_DETOKENIZED_TOKENS)]
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


class TokenizeCompletionRequest(Struct):
    """Request body of /tokenize for a prompt in vLLM's shape."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatRequest, kw_only=True):
    """Request body of /tokenize for a conversation in vLLM's shape."""

    return_token_strs: bool | None = None


class DetokenizeRequest(Struct):
    """Request body of /detokenize."""

    tokens: Annotated[list[NonNegativeInt], Meta(max_length=MAX_DETOKENIZED_TOKENS)]
    model: str | None = None


class TokenPiece(Struct, frozen=True):
    """A token with its text, or with its bytes if they are not valid UTF-8."""

    id: int
    piece: str | list[int]


class LlamaTokenizeReply(Struct, frozen=True):
    """Reply of /tokenize in llama-server's shape."""

    tokens: list[int] | list[TokenPiece]


class TokenizeReply(Struct, frozen=True):
    """Reply of /tokenize in vLLM's shape."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeReply(Struct, frozen=True):
    """Reply of /detokenize: the text as `content`, as in llama-server, and as `prompt`, as in vLLM."""

    content: str
    prompt: str


class ApplyTemplateReply(Struct, frozen=True):
    """Reply of /apply-template: the prompt of a conversation."""

    prompt: str


_BODY_KIND = msgspec.json.Decoder(_BodyKind)
_LLAMA_TOKENIZE = msgspec.json.Decoder(LlamaTokenizeRequest)
_TOKENIZE_COMPLETION = msgspec.json.Decoder(TokenizeCompletionRequest)
_TOKENIZE_CHAT = msgspec.json.Decoder(TokenizeChatRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
_CHAT_REQUEST = msgspec.json.Decoder(ChatRequest)


class TokenizeEndpoints:
    """The endpoints that convert between text and tokens."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def tokenize(self, request: Request) -> Response:
        """Returns the tokens of `content` in llama-server's shape, or of `prompt` or `messages` in vLLM's shape."""
        model = self._state.model
        body = await read_body(request, model.options.server.max_body)
        fields = await decode_any_body(_BODY_KIND, body)
        if bytes(fields.content) != b"null":
            return JSONResponse(await _llama_tokenize_reply(model, await decode_any_body(_LLAMA_TOKENIZE, body)))
        if bytes(fields.messages) != b"null":
            chat = await parse_any_generation_request(body, model, _TOKENIZE_CHAT)
            prepared = await prepare_chat(chat, model.prompts)
            return JSONResponse(await _tokenize_reply(model, prepared.prompt, chat.return_token_strs))
        if bytes(fields.prompt) != b"null":
            text = await decode_any_body(_TOKENIZE_COMPLETION, body)
            model.check_name(text.model)
            tokens = await _tokenize_completion(model, text)
            return JSONResponse(await _tokenize_reply(model, tokens, text.return_token_strs))
        raise RequestRefused(
            "The body needs content (llama-server's shape), or prompt or messages (vLLM's shape).", field="content"
        )

    async def detokenize(self, request: Request) -> Response:
        """Returns the text of `tokens`, with special tokens by name."""
        model = self._state.model
        body = await decode_any_body(_DETOKENIZE, await read_body(request, model.options.server.max_body))
        model.check_name(body.model)
        _check_tokens(model, body.tokens, "tokens")
        text = await run_long_in_thread(model.prompts.detokenize, body.tokens)
        return JSONResponse(DetokenizeReply(text, text))

    async def apply_template(self, request: Request) -> Response:
        """Returns the rendered prompt of a conversation, as a text that the completion endpoints accept."""
        model = self._state.model
        body = await read_generation_request(request, model, _CHAT_REQUEST)
        text = (await prepare_chat(body, model.prompts)).prompt_text
        return JSONResponse(ApplyTemplateReply(model.prompts.media.with_prompt_markers(text)))


async def _tokenize_completion(model: LoadedModel, body: TokenizeCompletionRequest) -> tuple[int, ...]:
    """Returns the tokens of a prompt as in a completion, or without BOS and EOS for `add_special_tokens: false`."""
    add = body.add_special_tokens is not False
    if not add or not body.prompt:
        return tuple(await model.prompts.tokenize_text(body.prompt, add_special=add, parse_special=True))
    return await model.prompts.tokenize_prompt(body.prompt)


async def _tokenize_reply(model: LoadedModel, tokens: tuple[int, ...], with_strings: bool | None) -> TokenizeReply:
    strings = None
    if with_strings:
        _check_tokens(model, tokens, "return_token_strs")
        strings = await run_long_in_thread(partial(map_distinct, function=model.engine.vocab.text), tokens)
    return TokenizeReply(len(tokens), model.engine.request_limit, list(tokens), strings)


async def _llama_tokenize_reply(model: LoadedModel, body: LlamaTokenizeRequest) -> LlamaTokenizeReply:
    """Returns the tokens of a text or of a mixed list of texts and tokens, with each token's text for `with_pieces`."""
    content, prompts = body.content, model.prompts
    add, parse = bool(body.add_special), body.parse_special is not False
    if isinstance(content, str):
        tokens = await prompts.tokenize_text(content, add_special=add, parse_special=parse)
    else:
        tokens = await prompts.tokenize_parts(content, add_special=add, parse_special=parse)
    if not body.with_pieces:
        return LlamaTokenizeReply(tokens)
    _check_tokens(model, tokens, "content")
    pieces = partial(map_distinct, function=partial(_token_piece, prompts))
    return LlamaTokenizeReply(await run_long_in_thread(pieces, tokens))


def _check_tokens(model: LoadedModel, tokens: Sequence[int], field: str) -> None:
    """Raises RequestRefused for ids outside of the vocabulary and for too many tokens."""
    size = model.engine.vocab.size
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        raise RequestRefused(f"{field} contains a token id outside of 0 to {size - 1}.", field=field)
    if len(tokens) > MAX_DETOKENIZED_TOKENS:
        raise RequestRefused(
            f"{field} has {len(tokens)} tokens; at most {MAX_DETOKENIZED_TOKENS} are converted to text.", field=field
        )


def _token_piece(prompts: PromptRenderer, token: int) -> TokenPiece:
    text = prompts.token_bytes(token)
    try:
        return TokenPiece(token, text.decode())
    except UnicodeDecodeError:
        return TokenPiece(token, list(text))
