"""A server that was killed or signalled under load, or whose files are damaged or cannot be written, generates the
same texts as before, without unexpected server errors."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

from tests.api.server import Server
from tests.sizes import sized

SIM = ("--sim", "--sim-cost", "free", "--port", "0", "-np", "4", "-c", "8192", "-cram", "1")
# Limits files to 512 bytes, so that longer writes fail as on a full disk.
NO_SPACE = ("sh", "-c", 'ulimit -f 1; exec "$@"', "sh", sys.executable, "-m", "api", "serve")


def flags(folder: Path) -> tuple[str, ...]:
    slots = folder / "slots"
    slots.mkdir(exist_ok=True)
    return (*SIM, "--cache-disk", str(folder / "kept"), "--slot-save-path", str(slots))


def post_request(url: str, body: dict[str, Any], key: str = "") -> urllib.request.Request:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return urllib.request.Request(url, json.dumps(body).encode(), headers)


def send(url: str, path: str, body: dict[str, Any], key: str = "") -> tuple[int, Any]:
    """Returns the status and body of the response to a POST request; 0 if the connection broke."""
    try:
        with urllib.request.urlopen(post_request(url + path, body, key), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except (OSError, ValueError):
        return 0, None


def completion(number: int) -> dict[str, Any]:
    return {"prompt": f"{number} " + "a word of many " * 30, "max_tokens": 20, "ignore_eos": True, "temperature": 0}


def texts(url: str) -> list[str]:
    found = [send(url, "/v1/completions", completion(number)) for number in range(4)]
    assert [status for status, _ in found] == [200] * 4
    return [body["choices"][0]["text"] for _, body in found]


class Load:
    """Clients that send completions, and save and restore slots, until the server is gone."""

    def __init__(self, url: str, key: str = "") -> None:
        self._url, self._key = url, key
        self.statuses: set[int] = set()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(6)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        random, status = Random(number), 200
        while status:
            if number < 4:
                status, _ = send(self._url, "/v1/completions", completion(random.randrange(50)), self._key)
            else:
                action = random.choice(["save", "restore"])
                path = f"/slots/{number % 4}?action={action}"
                status, _ = send(self._url, path, {"filename": f"{number}.bin"}, self._key)
            self.statuses.add(status)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def damage(folder: Path, random: Random) -> None:
    """Cuts or changes a third of the files below `folder`."""
    for path in folder.rglob("*"):
        if path.is_file() and random.random() < 0.33:
            content = bytearray(path.read_bytes())
            if random.random() < 0.5:
                del content[len(content) // 2 :]
            elif content:
                content[random.randrange(len(content))] ^= 0xFF
            path.write_bytes(content)


def test_a_server_killed_under_load_starts_again_with_damaged_files(tmp_path: Path) -> None:
    random, wanted = Random(1), list[str]()
    for _ in range(sized(2, 20)):
        server = Server(*flags(tmp_path))
        try:
            url = server.ready()
            wanted = wanted or texts(url)
            assert texts(url) == wanted
            load = Load(url)
            time.sleep(random.uniform(0.2, 0.6))
            server.signal(signal.SIGKILL)
            load.join()
            assert {status for status in load.statuses if status >= 500} == set()
        finally:
            server.close()
        damage(tmp_path, random)
    server = Server(*flags(tmp_path))
    try:
        url = server.ready()
        assert texts(url) == wanted
        load = Load(url)
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        load.join()
        assert server.wait() == 0
        assert list((tmp_path / "kept").rglob("*.part")) == []  # a running server may be writing one
        assert {status for status in load.statuses if status >= 500} <= {503}
    finally:
        server.close()


def write_keys(path: Path, *keys: str) -> None:
    path.write_text(json.dumps({"keys": [{"key": key, "admin": True} for key in keys]}))


def test_signals_under_load_drop_no_request(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    write_keys(keys, "load", "stream")
    server = Server(*flags(tmp_path), "--keys", str(keys), "--grace", "60")
    try:
        url = server.ready()
        load = Load(url, "load")
        body = {"prompt": "On and on", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with urllib.request.urlopen(post_request(url + "/v1/completions", body, "stream"), timeout=30) as stream:
            assert stream.readline().startswith(b"data: ")
            for name in ("first", "second", "third"):
                write_keys(keys, "load", name)  # the key of the stream is invalid from now on
                server.signal(signal.SIGHUP)
                server.until("2 API keys")
                assert send(url, "/v1/completions", completion(1), name)[0] == 200
                assert send(url, "/v1/completions", completion(1), "stream")[0] == 401
            assert 200 in load.statuses
            assert {status for status in load.statuses if status in (0, 401) or status >= 500} == set()
            server.signal(signal.SIGINT)
            lines = stream.read().splitlines()
        load.join()
        assert server.wait() == 0
        assert lines[-2:] == [b"data: [DONE]", b""], "the stream ends as without signals"
        assert sum(line.startswith(b"data: {") for line in lines) > 100
        assert {status for status in load.statuses if status in (401, 403) or status >= 500} <= {503}
        assert not any("Traceback" in line for line in server.lines), server.lines
    finally:
        server.close()


def test_a_server_on_a_full_disk_serves(tmp_path: Path) -> None:
    server = Server(*flags(tmp_path), command=NO_SPACE)
    try:
        url = server.ready()
        assert texts(url) == texts(url)
        status, answer = send(url, "/slots/0?action=save", {"filename": "a.bin"})
        assert status == 500
        assert "'a.bin' cannot be written" in answer["error"]["message"]
        assert list((tmp_path / "slots").iterdir()) == []
        assert texts(url) == texts(url)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.lines), server.lines
    finally:
        server.close()


def test_the_process_of_an_engine_ends_with_the_server() -> None:
    server = Server(*SIM, "--engine-process")
    try:
        url = server.ready()
        assert len(set(texts(url))) == 4
        with urllib.request.urlopen(url + "/metrics", timeout=30) as response:
            assert b"paceline_engine_process_resident_memory_bytes" in response.read()
        pid = server.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children
        server.signal(signal.SIGKILL)
        server.wait()
        until = time.monotonic() + 20
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < until, "a process is left"
            time.sleep(0.05)
    finally:
        server.close()
