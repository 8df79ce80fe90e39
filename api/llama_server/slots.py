"""GET /slots and POST /slots/{id}, in llama-server's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.generation.loaded_model import AppState, LoadedModel
from api.http.decode_errors import choices_hint
from api.http.error_responses import EndpointDisabled, NoIdleSlot
from api.http.request_body import read_body
from api.http.responses import JSONResponse
from api.schema.requests import decode_body
from engine import DraftStats, RequestRefused, RequestState, SlotState

_ACTIONS = ("save", "restore", "erase")
_MAX_FILENAME_BYTES = 255
# int() refuses texts of thousands of digits.
_MAX_SLOT_DIGITS = 254
_CONTROL_CHARACTERS = frozenset(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
# Path separators and their look-alikes, and characters that some file system forbids in names.
_FORBIDDEN_CHARACTERS = _CONTROL_CHARACTERS | frozenset('/\\:*?"<>|\uff0e\u2215\u2216\ufffd\ufeff')


class NextToken(Struct, frozen=True):
    """The decode progress of a request, in tokens."""

    has_next_token: bool
    n_remain: int
    """Remaining tokens until `max_tokens`; -1 without `max_tokens`."""
    n_decoded: int


class DraftStatsReply(Struct, frozen=True):
    """The results of one proposer type's drafts, in tokens."""

    type: str
    drafted: int
    accepted: int
    expected: float
    """Expected number of accepted tokens."""
    chance: float
    """Current probability that the first token of a draft is accepted."""
    gain_ms: float
    """Milliseconds saved by accepted tokens minus milliseconds spent on drafting and verifying, over all slots."""

    @classmethod
    def of(cls, drafts: DraftStats) -> DraftStatsReply:
        """Returns the engine's draft statistics in the reply's shape."""
        gain = 1e3 * (drafts.saved - drafts.spent)
        return cls(drafts.type, drafts.drafted, drafts.accepted, drafts.expected, drafts.chance, gain)


class SlotReply(Struct, frozen=True, kw_only=True):
    """A slot and its running or last request, without prompt and output."""

    id: int
    n_ctx: int
    speculative: bool
    """True if the slot has proposers."""
    is_processing: bool
    id_task: int | UnsetType = UNSET
    n_prompt_tokens: int | UnsetType = UNSET
    """Computed tokens of prompt and output, as in llama-server."""
    n_prompt_tokens_processed: int | UnsetType = UNSET
    n_prompt_tokens_cache: int | UnsetType = UNSET
    prompt_tokens: int | UnsetType = UNSET
    """Tokens of the prompt, computed or not."""
    params: dict[str, object] | UnsetType = UNSET
    next_token: Sequence[NextToken] | UnsetType = UNSET
    n_draft: int | UnsetType = UNSET
    """Length of the draft that the next step verifies."""
    drafts: Sequence[DraftStatsReply] | UnsetType = UNSET

    @classmethod
    def of(cls, state: SlotState, model: LoadedModel) -> SlotReply:
        """Returns the engine's slot state in llama-server's shape."""
        limit, request = model.engine.request_limit, state.request
        if request is None:
            return cls(id=state.number, n_ctx=limit, speculative=bool(model.default_proposers), is_processing=False)
        # As in llama-server, an idle slot has no budget left of its last request.
        remaining = request.max_tokens - request.emitted if state.busy and request.max_tokens is not None else -1
        return cls(
            id=state.number,
            n_ctx=limit,
            speculative=bool(request.proposers),
            is_processing=state.busy,
            id_task=request.key,
            n_prompt_tokens=state.tokens,
            n_prompt_tokens_processed=request.processed,
            n_prompt_tokens_cache=request.cached,
            prompt_tokens=request.prompt,
            params=_params(request),
            next_token=[NextToken(state.busy, remaining, request.emitted if state.busy else 0)],
            n_draft=request.draft,
            drafts=[DraftStatsReply.of(drafts) for drafts in request.drafts],
        )


def _params(request: RequestState) -> dict[str, object]:
    """Returns the parameters of a request except those that contain texts or tokens."""
    sampling = msgspec.structs.asdict(request.sampling)
    del sampling["logit_bias"], sampling["dry_sequence_breakers"]
    max_tokens = -1 if request.max_tokens is None else request.max_tokens
    return {
        **sampling,
        "n_predict": max_tokens,
        "max_tokens": max_tokens,
        "min_tokens": request.min_tokens,
        "ignore_eos": request.ignore_eos,
        "speculative.types": ",".join(request.proposers) or "none",
    }


class SlotFileTimings(Struct, frozen=True, omit_defaults=True):
    """Duration of a save or a restore, in milliseconds."""

    save_ms: float | UnsetType = UNSET
    restore_ms: float | UnsetType = UNSET


class SlotSavedReply(Struct, frozen=True):
    """The result of a save."""

    id_slot: int
    filename: str
    n_saved: int
    """Tokens written."""
    n_written: int
    """Bytes written."""
    timings: SlotFileTimings


class SlotRestoredReply(Struct, frozen=True):
    """The result of a restore."""

    id_slot: int
    filename: str
    n_restored: int
    """Tokens loaded."""
    n_read: int
    """Bytes loaded."""
    timings: SlotFileTimings


class SlotErasedReply(Struct, frozen=True):
    """The result of an erase."""

    id_slot: int
    n_erased: int
    """Tokens erased."""


class SlotFileRequest(Struct):
    """Request body of save and restore."""

    filename: str


_SLOT_FILE = msgspec.json.Decoder(SlotFileRequest)


class SlotEndpoints:
    """The endpoints below /slots."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    async def show(self, request: Request) -> Response:
        """Returns all slots. Raises NoIdleSlot if the query has `fail_on_no_slot` and all slots are busy."""
        model = self._state.model
        if not self._state.config.slots_endpoint:
            raise EndpointDisabled("This server does not support slots endpoint. Start it with `--slots`")
        states = await model.engine.slot_states()
        if request.query_params.get("fail_on_no_slot", "0") not in ("", "0") and all(state.busy for state in states):
            raise NoIdleSlot
        return JSONResponse([SlotReply.of(state, model) for state in states])

    async def act(self, request: Request) -> Response:
        """Saves, restores or erases the last sequence of a slot. A client's disconnect does not stop the action."""
        model, config = self._state.model, self._state.config
        action = request.query_params.get("action", "")
        if action not in _ACTIONS:
            raise RequestRefused(f"Invalid action {action[:32]!r}{choices_hint(action, _ACTIONS)}.", field="action")
        if not config.slot_save_path and not (action == "erase" and config.slots_endpoint):
            # The beginning is llama-server's message, as clients may match it.
            raise EndpointDisabled(
                "This server does not support slots action. Start it with `--slot-save-path` FOLDER, the folder of the "
                "slot files"
            )
        number = _slot_number(request.path_params["id"], model.engine.slots)
        if action == "erase":
            return JSONResponse(SlotErasedReply(number, await model.engine.erase_slot(number)))
        name = decode_body(_SLOT_FILE, await read_body(request, config.max_body)).filename
        path = Path(config.slot_save_path) / _checked_filename(name)
        if action == "save":
            saved = await model.engine.save_slot(number, path)
            timings = SlotFileTimings(save_ms=saved.seconds * 1e3)
            return JSONResponse(SlotSavedReply(number, name, saved.tokens, saved.bytes, timings))
        restored = await model.engine.restore_slot(number, path)
        timings = SlotFileTimings(restore_ms=restored.seconds * 1e3)
        return JSONResponse(SlotRestoredReply(number, name, restored.tokens, restored.bytes, timings))


def _slot_number(text: str, slots: int) -> int:
    """Returns the slot number in `text`. Raises HTTPException 404 if there is no such slot."""
    if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_SLOT_DIGITS) or int(text) >= slots:
        raise HTTPException(404, f"There is no slot {text[:32]!r}; slots are 0 to {slots - 1}.")
    return int(text)


def _checked_filename(name: str) -> str:
    """Returns `name`. Raises RequestRefused if `name` is not a portable file name without a folder."""
    has_unsafe_parts = name != name.strip(" ").rstrip(".") or ".." in name
    if (
        has_unsafe_parts
        or _FORBIDDEN_CHARACTERS.intersection(name)
        or not 0 < len(name.encode("utf-8", "replace")) <= _MAX_FILENAME_BYTES
    ):
        raise RequestRefused(
            f"Invalid filename: it must have 1 to {_MAX_FILENAME_BYTES} bytes, without separators, '..' and control "
            "characters, without a leading space, and without a space or full stop at the end.",
            field="filename",
        )
    return name
