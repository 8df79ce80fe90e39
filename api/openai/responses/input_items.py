"""Pages of the input items of a stored response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from api.http.decode_errors import as_refusal
from api.openai.responses.reply import InputItemList


class ItemPage(Struct, frozen=True):
    """The query of a page: at most `limit` items after the item with the id `after`."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"
    after: str | None = None

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> ItemPage:
        """Returns the page of a URL's query. Raises RequestRefused for an invalid value."""
        try:
            return msgspec.convert(dict(query), cls, strict=False)
        except msgspec.ValidationError as error:
            raise as_refusal(error, cls, dict(query)) from None

    def of(self, items: Sequence[dict[str, Any]]) -> InputItemList:
        """Returns the page of `items`, which are in order of the conversation. An unknown `after` selects no items."""
        ordered = list(items) if self.order == "asc" else list(reversed(items))
        if self.after is not None:
            positions = (position for position, item in enumerate(ordered) if item.get("id") == self.after)
            ordered = ordered[next(positions, len(ordered)) + 1 :]
        page = ordered[: self.limit]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return InputItemList(page, first, last, len(ordered) > len(page))
