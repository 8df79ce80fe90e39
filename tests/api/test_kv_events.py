"""KV events for routers: a subscriber over ZMQ rebuilds the prefix cache from vLLM's messages."""

from __future__ import annotations

import sys
import urllib.request
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from api.config.command_line import parse
from api.config.server import KVEventsConfig
from api.server.kv_events import KVEventPublisher
from api.server.lifecycle import START_FAILED, run
from bench.server import free_port
from engine import BLOCK_TOKENS, BlockChange
from engine.kv.block import Block, key_of, root_key
from tests.api.server import Server

WAIT_MS = 20_000
END = 2**64 - 1


class Subscriber:
    """A router's view of one worker: the hashes in each medium, and the gaps in the sequence numbers."""

    def __init__(self, endpoint: str, replay: str = "", topic: str = "") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self._connection = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.connect(endpoint)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        self.replay = self.context.socket(zmq.DEALER)
        if replay:
            self.replay.connect(replay)
        self.numbers: list[int] = []
        self.held: dict[str, set[int]] = {}
        self.events: list[Any] = []

    def await_connection(self) -> None:
        """Blocks until the publisher is connected, which may have bound its endpoint later. It drops earlier
        messages."""
        assert self._connection.poll(WAIT_MS), "not connected"

    def receive(self) -> list[Any]:
        """Applies the next message, and returns its events."""
        assert self.socket.poll(WAIT_MS), f"no message after {self.numbers}"
        _, number, payload = self.socket.recv_multipart()
        return self.apply(int.from_bytes(number, "big"), payload)

    def until(self, name: str) -> None:
        """Receives messages until one has an event of this name."""
        while not any(event[0] == name for event in self.receive()):
            pass

    def request_replay(self, first: int) -> None:
        """Applies all batches from the number `first` on that the publisher has kept."""
        self.replay.send_multipart((b"", first.to_bytes(8, "big")))
        while True:
            assert self.replay.poll(WAIT_MS)
            _, number, payload = self.replay.recv_multipart()
            if (received := int.from_bytes(number, "big")) == END:
                return
            self.apply(received, payload)

    def apply(self, number: int, payload: bytes) -> list[Any]:
        self.numbers.append(number)
        timestamp, events, rank = msgspec.msgpack.decode(payload)
        assert timestamp > 1e9
        assert rank == 0
        for event in events:
            match event:
                case ["BlockStored", hashes, parent, tokens, size, None, medium, _, _]:
                    assert size == BLOCK_TOKENS
                    assert len(tokens) == size * len(hashes)
                    assert parent is None or parent in self.held[medium]
                    self.held.setdefault(medium, set()).update(hashes)
                case ["BlockRemoved", hashes, medium]:
                    assert self.held[medium] >= set(hashes)
                    self.held[medium] -= set(hashes)
                case ["AllBlocksCleared"]:
                    self.held.clear()
                case _:
                    raise AssertionError(event)
        self.events += events
        return list(events)

    def close(self) -> None:
        self.context.destroy(linger=0)


@pytest.fixture
def endpoints(tmp_path: Path) -> tuple[str, str]:
    return f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"


def blocks(count: int, salt: str = "", *, stored: bool = True) -> list[BlockChange]:
    """Returns changes of the first blocks of one prefix in cells."""
    changes, block = list[BlockChange](), Block(None, 0, array("i"), root_key(salt))
    for number in range(count):
        tokens = array("i", range(number, number + BLOCK_TOKENS))
        block = Block(block, block.end, tokens, key_of(block.key, tokens.tobytes()))
        changes.append(BlockChange("cells", stored, block, salt))
    return changes


def connected(publisher: KVEventPublisher, subscriber: Subscriber) -> int:
    """Publishes until a message arrives, and returns the number of the last one. Earlier messages may be lost, as
    subscriptions take time."""
    while not subscriber.socket.poll(20):
        publisher.publish(blocks(1, "first"))
        publisher.publish(blocks(1, "first", stored=False))
    while subscriber.socket.poll(200):
        subscriber.receive()
    return subscriber.numbers[-1]


def test_order_gap_and_replay(endpoints: tuple[str, str]) -> None:
    replay, port = endpoints[1], free_port()
    config = KVEventsConfig(endpoint=f"@tcp://127.0.0.1:{port}", replay_endpoint=replay, topic="kv@here@model")
    publisher, endpoint = KVEventPublisher(config), f"tcp://127.0.0.1:{port}"
    subscriber, late = Subscriber(endpoint, replay, "kv@"), Subscriber(endpoint, replay)
    try:
        last = connected(publisher, subscriber)
        stored = blocks(3)
        hashes = [each.hash for each in stored]
        publisher.publish(stored[:1])
        publisher.max_queued = 0
        publisher.publish(stored[1:2])
        publisher.max_queued = 100
        publisher.publish(stored[2:] + blocks(3, stored=False)[::-1] + stored[:2])
        assert subscriber.receive() == [["BlockStored", hashes[:1], None, [*range(32)], 32, None, "GPU", None, None]]
        names = [event[0] for event in msgspec.msgpack.decode(subscriber.socket.recv_multipart()[2])[1]]
        assert names == ["BlockStored", "BlockRemoved", "BlockStored"]
        # The number of the dropped batch is missing in the replay, too.
        late.replay.send_multipart((b"", (last + 1).to_bytes(8, "big")))
        numbers = [int.from_bytes(late.replay.recv_multipart()[1], "big") for _ in range(3)]
        assert numbers == [last + 1, last + 3, END]
        assert [metric.samples[0].value for metric in publisher.collect()] == [last + 3, 1]
    finally:
        publisher.close()
        assert subscriber.receive() == [["AllBlocksCleared"]]
        subscriber.close()
        late.close()


def test_maps_and_salts(endpoints: tuple[str, str]) -> None:
    """Salts are extra keys of the first block. Events of salted blocks in RAM and on disk have no tokens."""
    endpoint, replay = endpoints
    publisher = KVEventPublisher(KVEventsConfig(endpoint=endpoint, replay_endpoint=replay, format="map"))
    try:
        salted, plain = blocks(2, "tenant"), blocks(1)
        publisher.publish([*salted, plain[0]._replace(medium="ram"), salted[0]._replace(medium="ram", namespace=None)])
        adapted = blocks(1, "\0lora abc:1.0\0tenant")
        publisher.publish([*adapted, *blocks(1, "\0lora abc:1.0\0tenant", stored=False)])
        subscriber = Subscriber(endpoint, replay)
        subscriber.replay.send_multipart((b"", bytes(8)))
        batches = [msgspec.msgpack.decode(subscriber.replay.recv_multipart()[2])[1] for _ in range(3)]
        subscriber.close()
    finally:
        publisher.close()
    assert batches[0] == [{"type": "AllBlocksCleared"}]
    first, ram, unknown = batches[1]
    assert first["block_hashes"] == [each.hash for each in salted]
    assert first["extra_keys"] == [["tenant"], None]
    assert (ram["medium"], len(ram["token_ids"]), ram["extra_keys"]) == ("CPU", 32, None)
    assert (unknown["token_ids"], unknown["block_hashes"]) == ([], [salted[0].hash])
    assert salted[0].hash != plain[0].hash
    assert (batches[2][0]["lora_name"], batches[2][0]["extra_keys"]) == ("abc:1.0", [["tenant"]])
    assert batches[2][1] == {"type": "BlockRemoved", "block_hashes": [adapted[0].hash], "medium": "GPU"}


def complete(url: str, prompt: list[int]) -> None:
    body = msgspec.json.encode({"prompt": prompt, "max_tokens": 2, "ignore_eos": True})
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def test_a_server_reports_its_cache(endpoints: tuple[str, str]) -> None:
    """Prompts store blocks, later prompts evict them, and the end of the server clears all."""
    endpoint, replay = endpoints
    flags = ["--sim", "--sim-cost", "free", "-np", "1", "-kvu", "-c", "256", "--cache-ram", "0", "--port", "0"]
    server = Server(*flags, "--kv-events-endpoint", endpoint, "--kv-events-replay-endpoint", replay)
    subscriber = Subscriber(endpoint, replay)
    try:
        url = server.ready()
        subscriber.await_connection()
        complete(url, [*range(1, 101)])
        subscriber.until("BlockStored")
        complete(url, [*range(1, 65), *range(300, 340)])  # shares two blocks
        for start in (400, 600):
            complete(url, [*range(start, start + 200)])
        subscriber.until("BlockRemoved")
        with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
            assert b"paceline_kv_event_batches_dropped_total 0.0" in response.read()
        live = subscriber.numbers[-1]
        mirror = Subscriber(endpoint, replay)
        mirror.request_replay(0)
        mirror.close()
        assert mirror.numbers == list(range(mirror.numbers[-1] + 1))
        assert mirror.numbers[-1] >= live
        shared = [event for event in mirror.events if event[0] == "BlockStored" and event[3][:32] == [*range(1, 33)]]
        assert len(shared) == 1, "shared blocks are stored once"
        assert 6 <= len(mirror.held["GPU"]) <= 8
        server.signal()
        subscriber.until("AllBlocksCleared")
        assert server.wait() == 0
    finally:
        server.close()
        subscriber.close()


@pytest.mark.usefixtures("_unchanged_log")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-events-replay-endpoint", "tcp://*:1"], "--kv-events-replay-endpoint needs --kv-events-endpoint"),
        (["--kv-events-endpoint", "tcp://*:x"], "--kv-events-endpoint: cannot use tcp://*:x: Invalid argument"),
        (
            ["--kv-events-endpoint", "tcp://*:{port}", "--kv-events-replay-endpoint", "tcp://*:{port}"],
            "--kv-events-replay-endpoint: cannot use tcp://*:{port}: Address already in use",
        ),
    ],
    ids=["replay alone", "no address", "in use"],
)
def test_unusable_endpoints(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    assert run(parse(["--sim", "--port", "0", *(flag.replace("{port}", port) for flag in flags)])) == START_FAILED
    assert message.replace("{port}", port) in capsys.readouterr().err


@pytest.mark.usefixtures("_unchanged_log")
def test_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.delitem(sys.modules, "api.server.kv_events", raising=False)
    assert run(parse(["--sim", "--port", "0", "--kv-events-endpoint", "tcp://*:1"])) == START_FAILED
    assert "paceline[kv-events]" in capsys.readouterr().err
