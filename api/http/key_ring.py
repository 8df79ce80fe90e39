"""The API keys of a server, with the limits and the current use of each."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Annotated

from msgspec import Meta, Struct

from api.http.error_responses import RateLimited

_SECONDS_PER_MINUTE = 60.0
# `Retry-After` of a key with too many concurrent requests.
_CONCURRENT_RETRY_SECONDS = 1.0


class ApiKey(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key and the rights of its requests. 0 is no limit."""

    key: Annotated[str, Meta(min_length=1, max_length=1024)]
    name: Annotated[str, Meta(pattern=r"^[\w.@-]{1,64}\Z")] | None = None
    """The key's name in metrics and logs. None for a key without a name."""
    weight: Annotated[float, Meta(gt=0.0, le=1000.0)] = 1.0
    """The key's share of slots and prefill, relative to those of other keys."""
    max_concurrent: Annotated[int, Meta(ge=0)] = 0
    """Maximum number of POST requests at once."""
    tokens_per_minute: Annotated[int, Meta(ge=0)] = 0
    """Maximum number of prompt and output tokens in a minute."""
    min_priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    """The least `priority` of its requests, unless it is an admin's."""
    admin: bool = False
    """Whether its requests may change what all clients share, and read the metrics."""

    @property
    def owner(self) -> str:
        """The key's name in the engine, which does not expose the key."""
        return f"key:{self.name or namespace_of(self.key)[:12]}"


class KeyUse:
    """The requests and tokens of a key. Tokens are counted by a bucket that holds those of one minute. They are taken
    at the end of a request, so the bucket can be overdrawn by the requests in progress."""

    def __init__(self, key: ApiKey) -> None:
        self.key = key
        self.concurrent = 0
        self._level = float(key.tokens_per_minute)
        self._updated = time.monotonic()

    def change(self, key: ApiKey) -> None:
        """Sets new limits and keeps the use."""
        self._level += key.tokens_per_minute - self.key.tokens_per_minute
        self.key = key

    def check(self) -> None:
        """Raises RateLimited if the key can have no further request now."""
        key = self.key
        if key.max_concurrent and self.concurrent >= key.max_concurrent:
            raise RateLimited("requests", f"{key.max_concurrent} concurrent requests", _CONCURRENT_RETRY_SECONDS)
        if key.tokens_per_minute and self._refilled() <= 0:
            raise RateLimited("tokens", f"{key.tokens_per_minute} tokens per minute", self._seconds_until(1.0))

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts a request for the length of the block. Raises RateLimited."""
        self.check()
        self.concurrent += 1
        try:
            yield
        finally:
            self.concurrent -= 1

    def take(self, tokens: int) -> None:
        """Counts the tokens of a request that has ended."""
        if self.key.tokens_per_minute:
            self._level = self._refilled() - tokens

    def headers(self) -> dict[str, str]:
        """Returns OpenAI's headers with the limits of the key and what is left of them."""
        key, headers = self.key, {}
        if key.max_concurrent:
            headers["x-ratelimit-limit-requests"] = str(key.max_concurrent)
            headers["x-ratelimit-remaining-requests"] = str(max(0, key.max_concurrent - self.concurrent))
        if key.tokens_per_minute:
            headers["x-ratelimit-limit-tokens"] = str(key.tokens_per_minute)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(self._refilled())))
            headers["x-ratelimit-reset-tokens"] = f"{self._seconds_until(key.tokens_per_minute):.3f}s"
        return headers

    def _refilled(self) -> float:
        now, limit = time.monotonic(), self.key.tokens_per_minute
        self._level = min(limit, self._level + limit * (now - self._updated) / _SECONDS_PER_MINUTE)
        self._updated = now
        return self._level

    def _seconds_until(self, level: float) -> float:
        return max(0.0, level - self._refilled()) * _SECONDS_PER_MINUTE / self.key.tokens_per_minute


class KeyRing:
    """The keys that a server accepts."""

    def __init__(self, keys: Iterable[ApiKey], *, required: bool = True) -> None:
        """Without `required` no request needs a key. With it and without keys, no request passes."""
        self.required = required
        # Keys are found by a hash that clients cannot compute, so that the duration of the search tells nothing.
        self._secret = secrets.token_bytes(32)
        self._uses: dict[bytes, KeyUse] = {}
        self.replace(keys)

    def __len__(self) -> int:
        return len(self._uses)

    def find(self, sent: str) -> KeyUse | None:
        """Returns the use of the key that a client sent; None for an unknown one."""
        return self._uses.get(self._hash(sent))

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Accepts `keys` and no others. Keys that stay keep their use. Requests in progress continue."""
        uses = {}
        for key in keys:
            digest = self._hash(key_text(key.key.encode("utf-8", "surrogateescape")))
            use = uses[digest] = self._uses.get(digest) or KeyUse(key)
            use.change(key)
        self._uses = uses

    @property
    def has_admins(self) -> bool:
        """True if some key is an admin's."""
        return any(use.key.admin for use in self._uses.values())

    @property
    def named(self) -> dict[str, KeyUse]:
        """The uses of the keys with names."""
        return {use.key.name: use for use in self._uses.values() if use.key.name}

    def _hash(self, text: str) -> bytes:
        return blake2b(text.encode("utf-8", "surrogateescape"), key=self._secret).digest()


def namespace_of(key: str) -> str:
    """Returns the namespace of a key, the same after a restart. A hash, so that stored prefixes do not expose the key.

    >>> namespace_of("one") == namespace_of("two")
    False
    """
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16, person=b"paceline key").hexdigest()


def key_text(sent: bytes) -> str:
    """Returns the text of a key in bytes of UTF-8 or Latin-1."""
    try:
        return sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1")
