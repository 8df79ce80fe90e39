"""Publishes KV events over ZMQ in vLLM's shape, for routers that send a prompt to the worker with its prefix in cache.

A message has the topic, a sequence number of 8 bytes, big-endian, and a batch in MessagePack: `[ts, events, 0]`. The
replay socket answers a sequence number with all kept batches from this number on, and then a message with the sequence
number -1 (`vllm/distributed/kv_events.py`). Needs the extra `paceline[kv-events]`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count, groupby
from typing import Any

import msgspec
import zmq
from msgspec import Struct, structs
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from api.config.server import KVEventsConfig
from engine import BLOCK_TOKENS, BlockChange, BlockMedium, split_namespace

_log = logging.getLogger("paceline.server")

# Further batches are dropped, so that a slow thread neither delays a step nor takes more memory.
QUEUED_BATCHES = 10_000
# Messages that ZMQ keeps for each slow subscriber, as in vLLM.
_SUBSCRIBER_MESSAGES = 100_000
# Maximum time for subscribers to receive the last messages of a server.
_LINGER_MS = 1000
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
# Names of the media in vLLM and in routers. KV cells are GPU on a CPU too: prefixes in them need no load.
_MEDIUM_NAMES: dict[BlockMedium, str] = {"cells": "GPU", "ram": "CPU", "disk": "DISK"}


class KVEvent(Struct, frozen=True, kw_only=True, array_like=True, tag=True, gc=False):
    """An event, as an array whose first item is its name."""


class BlockStored(KVEvent, frozen=True, kw_only=True, array_like=True, tag=True, gc=False):
    """Consecutive blocks of one prefix have entered a medium."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: array[int]
    """The tokens of all blocks. Empty in RAM and on disk for prefixes with a salt or adapters, as in vLLM for all
    blocks outside of the GPU."""
    block_size: int = BLOCK_TOKENS
    lora_id: None = None
    medium: str
    lora_name: str | None
    """Digests and scales of the adapters. None without adapters."""
    extra_keys: list[tuple[str] | None] | None
    """The salt for the first block of a prefix, and None for each later block. None without the first block or a
    salt."""


class BlockRemoved(KVEvent, frozen=True, kw_only=True, array_like=True, tag=True, gc=False):
    """Blocks have left a medium."""

    block_hashes: list[int]
    medium: str


class AllBlocksCleared(KVEvent, frozen=True, kw_only=True, array_like=True, tag=True, gc=False):
    """All blocks have left all media: the first and the last event of a server."""


def kv_events(changes: Iterable[BlockChange]) -> Iterator[KVEvent]:
    """Yields the changes as events in the same order, consecutive blocks as one event."""
    for (medium, stored), group in groupby(changes, key=lambda change: (change.medium, change.stored)):
        if not stored:
            yield BlockRemoved(block_hashes=[change.hash for change in group], medium=_MEDIUM_NAMES[medium])
            continue
        chain: list[BlockChange] = []
        for change in group:
            if chain and (change.parent_hash, change.namespace) != (chain[-1].hash, chain[-1].namespace):
                yield _stored(chain)
                chain = []
            chain.append(change)
        yield _stored(chain)


def _stored(chain: Sequence[BlockChange]) -> BlockStored:
    first, tokens = chain[0], array("i")
    salt, adapters = split_namespace(first.namespace or "")
    for change in chain if first.namespace is not None else ():
        tokens.extend(change.tokens)
    is_salted = salt and first.parent_hash is None
    return BlockStored(
        block_hashes=[change.hash for change in chain],
        parent_block_hash=first.parent_hash,
        token_ids=tokens,
        medium=_MEDIUM_NAMES[first.medium],
        lora_name=adapters or None,
        extra_keys=[(salt,), *[None] * (len(chain) - 1)] if is_salted else None,
    )


def _plain(value: object) -> Any:
    """Returns an array of tokens as a list, which msgspec can encode."""
    assert isinstance(value, array)
    return value.tolist()


class KVEventsUnusable(Exception):
    """An endpoint is in use, or is not an address."""


@contextmanager
def _usable(flag: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except zmq.ZMQError as error:
        raise KVEventsUnusable(f"{flag}: cannot use {endpoint}: {zmq.strerror(error.errno or 0)}") from None


class KVEventPublisher(Collector):
    """Publishes batches on a thread of its own. `publish` may be called on one thread at a time, `close` on any."""

    def __init__(self, config: KVEventsConfig, max_queued: int = QUEUED_BATCHES) -> None:
        """Raises KVEventsUnusable if an endpoint cannot be used."""
        self._topic, self._as_maps = config.topic.encode(), config.format == "map"
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
        self._queue: deque[tuple[int, float, list[BlockChange] | None]] = deque()
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer)
        self.max_queued = max_queued
        self._sequence = count()
        self._published = self._dropped = 0
        self._closed = False
        # If the buffer is full, the thread has been woken already, so `publish` need not wait until it can write.
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._context = zmq.Context()
        try:
            self._publisher, self._replay = self._open_sockets(config)
        except KVEventsUnusable:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._run, name="paceline-kv-events", daemon=True)
        self._thread.start()
        self._put(None)

    def _open_sockets(self, config: KVEventsConfig) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes] | None]:
        publisher = self._context.socket(zmq.PUB)
        publisher.set_hwm(_SUBSCRIBER_MESSAGES)
        # As in vLLM, an address with a wildcard is bound, any other one connected to. The signs are CZMQ's.
        sign, address = config.endpoint[0], config.endpoint.lstrip("@>")
        bound = sign == "@" or (sign != ">" and any(part in address for part in ("*", "::", "ipc://")))
        with _usable("--kv-events-endpoint", address):
            (publisher.bind if bound else publisher.connect)(address)
        if not config.replay_endpoint:
            return publisher, None
        replay = self._context.socket(zmq.ROUTER)
        replay.set_hwm(0)  # no limit: a replay may have all kept messages
        with _usable("--kv-events-replay-endpoint", config.replay_endpoint):
            replay.bind(config.replay_endpoint)
        return publisher, replay

    def publish(self, changes: list[BlockChange]) -> None:
        """Queues the changes as one batch. If too many are queued, it is dropped, and subscribers miss its number."""
        self._put(changes)

    def _put(self, changes: list[BlockChange] | None) -> None:
        """Queues a batch of changes; None stands for the event AllBlocksCleared."""
        sequence = next(self._sequence)
        if len(self._queue) >= self.max_queued:
            self._dropped += 1
            return
        self._queue.append((sequence, time.time(), changes))
        with suppress(BlockingIOError):
            self._wake.send(b"\0")

    def collect(self) -> Iterator[Metric]:
        """Yields the counters of published and dropped batches for Prometheus."""
        yield CounterMetricFamily("paceline_kv_event_batches", "Batches of KV events published", value=self._published)
        dropped = "Batches of KV events dropped because too many were queued"
        yield CounterMetricFamily("paceline_kv_event_batches_dropped", dropped, value=self._dropped)

    def close(self) -> None:
        """Publishes AllBlocksCleared, and ends the thread. `publish` must not be called afterwards."""
        self._put(None)
        self._closed = True
        self._wake.close()
        self._thread.join()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._wake.close()
        self._woken.close()
        self._context.destroy(linger=_LINGER_MS)

    # ── on the thread ──

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._woken, zmq.POLLIN)
        if self._replay is not None:
            poller.register(self._replay, zmq.POLLIN)
        while not self._closed:
            for ready, _ in poller.poll():
                if self._replay is not None and ready == self._replay:
                    self._answer_replay(self._replay)
                else:
                    self._woken.recv(4096)
            self._send_queued()

    def _send_queued(self) -> None:
        while self._queue:
            sequence, timestamp, changes = self._queue.popleft()
            payload = self._encode(timestamp, changes)
            number = sequence.to_bytes(8, "big")
            self._publisher.send_multipart((self._topic, number, payload))
            self._kept.append((number, payload))
            self._published += 1

    def _encode(self, timestamp: float, changes: list[BlockChange] | None) -> bytes:
        events: list[Any] = [AllBlocksCleared()] if changes is None else list(kv_events(changes))
        if self._as_maps:
            events = [{"type": type(event).__name__, **structs.asdict(event)} for event in events]
        return self._encoder.encode((timestamp, events, 0))

    def _answer_replay(self, replay: zmq.Socket[bytes]) -> None:
        """Sends all kept batches from the requested number on, and then `_END_OF_REPLAY`. Logs other messages."""
        match replay.recv_multipart():
            case [client, b"", first] if len(first) == 8:
                for number, payload in self._kept:
                    if number >= first:
                        replay.send_multipart((client, b"", number, payload))
                replay.send_multipart((client, b"", _END_OF_REPLAY, b""))
            case frames:
                _log.warning(
                    "ignored a replay request of %d frames: expected an empty frame and a sequence number of 8 bytes",
                    len(frames) - 1,
                )
