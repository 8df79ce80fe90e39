"""Keeps responses in memory for `previous_response_id`, item references and GET, up to a number of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec
from msgspec import Struct
from starlette.exceptions import HTTPException

from api.http.decode_errors import quoted
from api.http.events import encode_json
from api.openai.responses.conversation import item_type
from api.openai.responses.reply import ResponseReply
from engine import RequestRefused

_RESEND = " It may have been dropped; send the whole conversation as input."
_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}
_ID_PREFIXES |= {"custom_tool_call": "ctc", "custom_tool_call_output": "ctco"}
_QUOTED_CHARS = 64


class StoredResponse(Struct, frozen=True):
    """A response, encoded as JSON. Encoded items are shared with the responses before it."""

    body: bytes
    input: tuple[bytes, ...]
    """The items of the whole conversation before the output."""
    output: tuple[bytes, ...]
    item_keys: tuple[tuple[str, str], ...]
    """The namespace and id of each item that no response before it has."""

    @property
    def size(self) -> int:
        """The number of bytes, shared items included."""
        return len(self.body) + sum(map(len, self.input)) + sum(map(len, self.output))

    @property
    def conversation(self) -> tuple[bytes, ...]:
        """The items of the input and the output."""
        return self.input + self.output


class ResponseStore:
    """The latest responses of all API keys. The least recently used ones are dropped beyond `max_bytes`.

    A namespace finds only its own responses. With `max_bytes` 0 nothing is stored.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._items: dict[tuple[str, str], bytes] = {}  # items of inputs and outputs by id
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    @property
    def enabled(self) -> bool:
        """True if responses are stored."""
        return self._max_bytes > 0

    def put(
        self, namespace: str, reply: ResponseReply, previous: Iterable[bytes], new: Iterable[Mapping[str, Any]]
    ) -> bool:
        """Stores a finished response with the items of its input, those of `previous` responses and `new` ones.

        Returns False, with nothing stored, for a response that alone is too large.
        """
        added = [((namespace, str(item["id"])), encode_json(item)) for item in new]
        output = [((namespace, item.id), encode_json(item)) for item in reply.output]
        items = {key: data for key, data in (*added, *output) if key not in self._items}
        stored = StoredResponse(
            body=encode_json(reply),
            input=(*previous, *(data for _, data in added)),
            output=tuple(data for _, data in output),
            item_keys=tuple(items),
        )
        if stored.size > self._max_bytes:
            return False
        self._responses[namespace, reply.id] = stored
        self._items |= items
        self._bytes += stored.size
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._responses)))
        return True

    def get(self, namespace: str, id: str) -> StoredResponse:
        """Returns a response. Raises HTTPException 404 if it is not stored."""
        stored = self._responses.get((namespace, id))
        if stored is None:
            raise HTTPException(404, f"Response with id {id[:_QUOTED_CHARS]!r} not found.{self._remedy}")
        self._responses.move_to_end((namespace, id))
        return stored

    def previous(self, namespace: str, id: str | None) -> tuple[bytes, ...]:
        """Returns the items of the conversation up to a response; none without an id. Raises RequestRefused."""
        if id is None:
            return ()
        try:
            return self.get(namespace, id).conversation
        except HTTPException:
            raise RequestRefused(
                f"Previous response with id {id[:_QUOTED_CHARS]!r} not found.{self._remedy or _RESEND}",
                field="previous_response_id",
            ) from None

    def delete(self, namespace: str, id: str) -> None:
        """Drops a response. Raises HTTPException 404 if it is not stored."""
        self.get(namespace, id)
        self._drop((namespace, id))

    def resolved_items(self, namespace: str, items: str | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Returns the items of an input, each with an id. Replaces references by the items of stored responses.

        Raises RequestRefused for a reference to an unknown item, an item without a type, and an id that is no string.
        """
        if isinstance(items, str):
            items = [{"role": "user", "content": [{"type": "input_text", "text": items}]}]
        return [self._resolved(namespace, item, f"input[{index}]") for index, item in enumerate(items)]

    def _resolved(self, namespace: str, item: Mapping[str, Any], path: str) -> Mapping[str, Any]:
        kind, id = item_type(item), item.get("id")
        if kind is None:
            raise RequestRefused(f"{path}.type: the field is missing; expected a string", field=f"{path}.type")
        if kind != "item_reference" and not id:
            id = f"{_ID_PREFIXES.get(kind, 'item')}_{uuid4().hex}"
        if not isinstance(id, str):
            raise RequestRefused(f"{path}.id: expected a string, not {quoted(id)}", field=f"{path}.id")
        if kind != "item_reference":
            return {**item, "type": kind, "id": id}
        found = self._items.get((namespace, id))
        if found is None:
            raise RequestRefused(
                f"{path}.id: item with id {id[:_QUOTED_CHARS]!r} not found.{self._remedy or _RESEND}",
                field=f"{path}.id",
            )
        return decoded_items([found])[0]

    @property
    def _remedy(self) -> str:
        """A sentence for errors if nothing is stored."""
        return "" if self.enabled else " This server stores no responses; start it with --response-store 64."

    def _drop(self, key: tuple[str, str]) -> None:
        stored = self._responses.pop(key)
        self._bytes -= stored.size
        for item in stored.item_keys:
            del self._items[item]


def decoded_items(items: Iterable[bytes]) -> list[dict[str, Any]]:
    """Returns encoded items as objects."""
    return [msgspec.json.decode(item) for item in items]
