"""GET /slots and POST /slots/{id}, in llama-server's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.generation.loaded_model import Served, Site
from api.http.decode_errors import nearest
from api.http.error_responses import NoIdleSlot, SwitchedOff
from api.http.request_body import read
from api.http.responses import JSONReply
from api.schema.requests import decode
from engine import Drafts, Ran, RequestRefused, SlotState

ACTIONS = ("save", "restore", "erase")
LONGEST = 255
"""Bytes of a file's name."""
CONTROLS = frozenset(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
FORBIDDEN = CONTROLS | frozenset('/\\:*?"<>|\uff0e\u2215\u2216\ufffd\ufeff')
"""Characters that no file's name may have: separators and what looks like them, those that some system cannot have,
and control characters."""


class NextToken(Struct, frozen=True):
    """How far a request is."""

    has_next_token: bool
    n_remain: int
    """Tokens that it may still emit; -1 if its context is the only limit."""
    n_decoded: int


class DraftsReply(Struct, frozen=True):
    """What became of one type's drafts, in tokens."""

    type: str
    drafted: int
    accepted: int
    expected: float
    """Of those drafted, how many were expected to be right."""
    chance: float
    """As of now, that the first token of another draft is right."""
    gain_ms: float
    """Milliseconds of everybody's that the right ones saved, less those that all of them took."""

    @classmethod
    def of(cls, drafts: Drafts) -> DraftsReply:
        """The same for clients."""
        gain = 1e3 * (drafts.saved - drafts.spent)
        return cls(drafts.type, drafts.drafted, drafts.accepted, drafts.expected, drafts.chance, gain)


class SlotReply(Struct, frozen=True, kw_only=True):
    """A slot, and the request that it runs or ran last; nothing of a text."""

    id: int
    n_ctx: int
    speculative: bool
    """Whether anybody guesses."""
    is_processing: bool
    id_task: int | UnsetType = UNSET
    n_prompt_tokens: int | UnsetType = UNSET
    """As with llama-server, all tokens that are computed, emitted ones too."""
    n_prompt_tokens_processed: int | UnsetType = UNSET
    n_prompt_tokens_cache: int | UnsetType = UNSET
    params: dict[str, object] | UnsetType = UNSET
    next_token: Sequence[NextToken] | UnsetType = UNSET
    n_draft: int | UnsetType = UNSET
    """Tokens of the draft that the next step verifies."""
    drafts: Sequence[DraftsReply] | UnsetType = UNSET

    @classmethod
    def of(cls, state: SlotState, served: Served) -> SlotReply:
        """The same for clients."""
        limit, ran = served.engine.request_limit, state.ran
        if ran is None:
            return cls(id=state.number, n_ctx=limit, speculative=bool(served.guessers), is_processing=False)
        remaining = -1 if ran.most is None else ran.most - ran.emitted
        return cls(
            id=state.number,
            n_ctx=limit,
            speculative=bool(ran.guessers),
            is_processing=state.busy,
            id_task=ran.key,
            n_prompt_tokens=state.tokens,
            n_prompt_tokens_processed=ran.processed,
            n_prompt_tokens_cache=ran.cached,
            params=_params(ran),
            next_token=[NextToken(state.busy, remaining, ran.emitted)],
            n_draft=ran.draft,
            drafts=[DraftsReply.of(drafts) for drafts in ran.drafts],
        )


def _params(ran: Ran) -> dict[str, object]:
    """What the request asked for, but for texts and tokens."""
    sampling = msgspec.structs.asdict(ran.sampling)
    del sampling["logit_bias"], sampling["dry_sequence_breakers"]
    most = -1 if ran.most is None else ran.most
    return {
        **sampling,
        "n_predict": most,
        "max_tokens": most,
        "min_tokens": ran.min_tokens,
        "ignore_eos": ran.ignore_eos,
        "speculative.types": ",".join(ran.guessers) or "none",
    }


class Timings(Struct, frozen=True, omit_defaults=True):
    """Milliseconds that it took."""

    save_ms: float | UnsetType = UNSET
    restore_ms: float | UnsetType = UNSET


class SavedReply(Struct, frozen=True):
    """What a file was given."""

    id_slot: int
    filename: str
    n_saved: int
    """Tokens."""
    n_written: int
    """Bytes."""
    timings: Timings


class RestoredReply(Struct, frozen=True):
    """What a file had."""

    id_slot: int
    filename: str
    n_restored: int
    n_read: int
    timings: Timings


class ErasedReply(Struct, frozen=True):
    """What is known no more."""

    id_slot: int
    n_erased: int


class FileRequest(Struct):
    """The body of save and restore."""

    filename: str


_DECODER = msgspec.json.Decoder(FileRequest)


class Slots:
    """The endpoints."""

    def __init__(self, site: Site) -> None:
        self._site = site

    async def show(self, request: Request) -> Response:
        """All slots; with `fail_on_no_slot` 503 if none is idle."""
        served = self._site.open
        if not self._site.config.slots_endpoint:
            raise SwitchedOff("This server does not support slots endpoint. Start it with `--slots`")
        states = await served.engine.slot_states()
        if request.query_params.get("fail_on_no_slot", "0") not in ("", "0") and all(state.busy for state in states):
            raise NoIdleSlot
        return JSONReply([SlotReply.of(state, served) for state in states])

    async def act(self, request: Request) -> Response:
        """Saves, restores or erases what a slot ran last. It is done to its end, also if the client goes."""
        served, config = self._site.open, self._site.config
        action = request.query_params.get("action", "")
        if action not in ACTIONS:
            raise RequestRefused(f"Invalid action {action[:32]!r}{nearest(action, ACTIONS)}.", field="action")
        if not config.slot_save_path and not (action == "erase" and config.slots_endpoint):
            raise SwitchedOff("This server does not support slots action. Start it with `--slot-save-path`")
        number = _number(request.path_params["id"], served.engine.slots)
        if action == "erase":
            return JSONReply(ErasedReply(number, await served.engine.erase_slot(number)))
        name = decode(_DECODER, await read(request, config.max_body)).filename
        path = Path(config.slot_save_path) / checked(name)
        if action == "save":
            saved = await served.engine.save_slot(number, path)
            timings = Timings(save_ms=saved.seconds * 1e3)
            return JSONReply(SavedReply(number, name, saved.tokens, saved.bytes, timings))
        found = await served.engine.restore_slot(number, path)
        timings = Timings(restore_ms=found.seconds * 1e3)
        return JSONReply(RestoredReply(number, name, found.tokens, found.bytes, timings))


def _number(text: str, slots: int) -> int:
    """The number of a slot that there is. Raises HTTPException 404."""
    if not (text.isascii() and text.isdecimal() and len(text) < LONGEST) or int(text) >= slots:
        raise HTTPException(404, f"There is no slot {text[:32]!r}, only 0 to {slots - 1}.")
    return int(text)


def checked(name: str) -> str:
    """`name`, if it names a file in the folder itself on every system. Raises RequestRefused."""
    dressed = name != name.strip(" ").rstrip(".") or ".." in name
    if dressed or FORBIDDEN.intersection(name) or not 0 < len(name.encode("utf-8", "replace")) <= LONGEST:
        raise RequestRefused(
            f"Invalid filename: 1 to {LONGEST} bytes without separators, '..' or control characters are possible, "
            "and no space or full stop at the end.",
            field="filename",
        )
    return name
