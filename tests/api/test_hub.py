"""Models from a hub and from URLs: choice of files, downloads that continue, errors, the cache and its commands."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from api.__main__ import main
from api.config.options import Options
from api.hub.cache import cached_models, partial_bytes, remove_model, remove_partial_files
from api.hub.errors import HubError, shown_url
from api.hub.gguf_names import all_parts, choose_head, choose_model, choose_projector, files_of
from api.hub.repository import Hub, fetch_model, find_projector
from api.hub.resolve import resolve_models
from api.hub.url import fetch_url
from tests.api.hub_server import HubServer, commit, serve_hub

SMALL, LARGE = b"GGUF small" * 100, b"GGUF large" * 5000
SPLIT = {f"big/big-Q8_0-{part:05}-of-00003.gguf": b"GGUF part %d" % part for part in (1, 2, 3)}
FILES = {"m-Q8_0.gguf": SMALL, "m-Q4_K_M.gguf": LARGE, "mmproj-F16.gguf": b"GGUF projector", "README.md": b"text"}
REPOSITORY = "some/Model-GGUF"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serve_hub() as hub:
        hub.files = {REPOSITORY: dict(FILES), "other/Split": dict(SPLIT), "some/weights": {"model.safetensors": b"x"}}
        yield hub


@pytest.fixture
def hub(server: HubServer, tmp_path: Path) -> Hub:
    return Hub(endpoint=server.url, folder=tmp_path / "cache", token="secret")


class Notes(list[str]):
    """Lines about cached files that are used; those about downloads are dropped."""

    def __call__(self, line: str) -> None:
        if not line.startswith("Downloading "):
            self.append(line)


@pytest.fixture
def notes() -> Notes:
    return Notes()


def partial(hub: Hub, content: bytes) -> bytes:
    """Returns the bytes of the partial download of `content`, which exists."""
    (path,) = hub.folder.glob(f"*/blobs/{hashlib.sha256(content).hexdigest()}.*.incomplete")
    return path.read_bytes()


def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes huggingface_hub continue without a pause, and write chunks of 10,000 bytes."""
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)


# ── names ──


@pytest.mark.parametrize(
    ("quant", "paths", "chosen"),
    [
        ("", ["a-Q8_0.gguf", "a-Q4_K_M.gguf"], "a-Q4_K_M.gguf"),
        ("", ["a-F16.gguf", "a-q8_0.gguf"], "a-q8_0.gguf"),
        ("", ["mmproj-a-Q4_K_M.gguf", "imatrix.gguf", "a-F16.gguf"], "a-F16.gguf"),
        ("q5_k_m", ["a-Q4_K_M.gguf", "a.Q5_K_M.gguf"], "a.Q5_K_M.gguf"),
        ("Q8_0", ["d/a-Q8_0-00002-of-00002.gguf", "d/a-Q8_0-00001-of-00002.gguf"], "d/a-Q8_0-00001-of-00002.gguf"),
        ("Q2_K", ["a-Q4_K_M.gguf"], None),
        ("", ["README.md"], None),
    ],
)
def test_the_quantization_is_chosen_as_llama_server_does(quant: str, paths: list[str], chosen: str | None) -> None:
    assert choose_model(paths, quant) == chosen


@pytest.mark.parametrize(
    ("model", "quant", "chosen"),
    [
        ("a/m-Q4_K_M.gguf", "", "a/mtp-m-Q5_0.gguf"),
        ("a/m-Q4_K_M.gguf", "q8_0", "a/mtp-m-Q8_0.gguf"),
        ("b/m-Q4_K_M.gguf", "", "mtp-m-F16.gguf"),
        ("", "", "mtp-m-F16.gguf"),
    ],
)
def test_mtp_layers_are_chosen_as_llama_server_does(model: str, quant: str, chosen: str) -> None:
    paths = ["a/m-Q4_K_M.gguf", "mtp-m-F16.gguf", "a/mtp-m-Q8_0.gguf", "a/mtp-m-Q5_0.gguf", "c/mtp-m-Q4_0.gguf"]
    assert choose_head(paths, model, quant) == chosen
    assert choose_head(paths[:1], model, quant) is None


def test_all_files_of_a_split_model() -> None:
    parts = list(SPLIT)
    assert files_of(["big/big-Q8_0-00001-of-00002.gguf", *reversed(parts)], parts[0]) == tuple(parts)
    assert all_parts("http://h/big-Q8_0-00001-of-00003.gguf")[2] == "http://h/big-Q8_0-00003-of-00003.gguf"
    assert shown_url("https://user:word@h/m.gguf?token=1") == "https://h/m.gguf"


# ── repositories ──


def test_a_model_is_downloaded_once_without_its_projector(server: HubServer, hub: Hub, notes: Notes) -> None:
    path = fetch_model(hub, REPOSITORY, "", notes)
    assert (path.name, path.read_bytes(), partial_bytes(hub)) == ("m-Q4_K_M.gguf", LARGE, 0)
    assert [each.path for each in server.downloads()] == [
        f"/{REPOSITORY}/resolve/{commit(REPOSITORY)}/m-Q4_K_M.gguf",
        f"/cdn/{REPOSITORY}/m-Q4_K_M.gguf",
    ]
    assert [bool(each.token) for each in server.downloads()] == [True, False]  # another host gets no token
    assert fetch_model(hub, f"{REPOSITORY}:q4_k_m", "", notes) == path
    assert fetch_model(hub, REPOSITORY, "m-Q8_0.gguf", notes).read_bytes() == SMALL
    assert len(server.downloads()) == 4
    offline = Hub(endpoint="http://127.0.0.1:1", folder=hub.folder, offline=True)
    assert fetch_model(offline, REPOSITORY, "", notes) == path
    assert not notes


def test_the_projector_of_a_repository(server: HubServer, hub: Hub, notes: Notes) -> None:
    assert find_projector(hub, f"{REPOSITORY}:Q8_0") == "mmproj-F16.gguf"
    assert fetch_model(hub, REPOSITORY, "mmproj-F16.gguf", notes).read_bytes() == b"GGUF projector"
    assert find_projector(hub, "other/Split") == ""
    away = Hub(endpoint="http://127.0.0.1:1", folder=hub.folder)
    assert find_projector(away, REPOSITORY) == "mmproj-F16.gguf"
    names = ["a-Q8_0.gguf", "mmproj-Q8_0.gguf", "mmproj-F16.gguf", "mmproj.gguf"]
    assert [choose_projector(names, quant) for quant in ("", "q8_0", "Q4_0")] == [names[2], names[1], names[2]]


@pytest.mark.parametrize(
    ("config", "types", "draft"),
    [
        ({"repo": REPOSITORY}, ("draft-mtp",), "mtp-m-Q8_0.gguf"),
        ({"repo": REPOSITORY}, ("auto",), ""),
        ({"draft_repo": REPOSITORY}, ("auto",), "mtp-m-Q8_0.gguf"),
        ({"draft_repo": REPOSITORY}, ("draft",), "m-Q4_K_M.gguf"),
        ({"repo": "other/Split:Q8_0"}, ("draft-mtp",), ""),
    ],
)
def test_mtp_layers_of_a_repository(
    server: HubServer,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, str],
    types: tuple[str, ...],
    draft: str,
) -> None:
    server.files[REPOSITORY]["mtp-m-Q8_0.gguf"] = b"GGUF head"
    monkeypatch.setattr("api.hub.resolve.hub_of", lambda config: hub)
    given = {"hub": config | {"mmproj_auto": False}, "model": {"path": "m.gguf"}, "speculation": {"types": types}}
    options = resolve_models(msgspec.convert(given, Options), lambda line: None)
    assert Path(options.draft.path).name == draft


def test_all_parts_of_a_split_model(hub: Hub, notes: Notes) -> None:
    path = fetch_model(hub, "other/Split:Q8_0", "", notes)
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == {
        Path(name).name: content for name, content in SPLIT.items()
    }
    assert path.name == "big-Q8_0-00001-of-00003.gguf"


def test_a_cut_download_continues(server: HubServer, hub: Hub, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    retry_at_once(monkeypatch)
    server.cut_after = [20_000, 10_000]
    assert fetch_model(hub, REPOSITORY, "", notes).read_bytes() == LARGE
    ranges = [each.range for each in server.downloads() if each.path.startswith("/cdn/")]
    assert ranges == ["", "bytes=20000-", "bytes=30000-"]


def test_a_download_continues_in_the_next_process(
    server: HubServer, hub: Hub, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    retry_at_once(monkeypatch)
    server.cut_after = [20_000] + 6 * [0]
    with pytest.raises(HubError, match=r"the connection broke off: .*; check the network, or use --offline"):
        fetch_model(hub, REPOSITORY, "", notes)
    assert partial(hub, LARGE) == LARGE[:20_000]
    assert fetch_model(hub, REPOSITORY, "", notes).read_bytes() == LARGE
    assert server.downloads()[-1].range == "bytes=20000-"


def test_a_wrong_hash_removes_the_file(server: HubServer, hub: Hub, notes: Notes) -> None:
    server.damaged = True
    with pytest.raises(HubError, match=r"m-Q8_0\.gguf was damaged in transfer and is removed: its hash is \w{64}, not"):
        fetch_model(hub, f"{REPOSITORY}:Q8_0", "", notes)
    assert (partial_bytes(hub), cached_models(hub)) == (0, [])
    server.damaged = False
    assert fetch_model(hub, f"{REPOSITORY}:Q8_0", "", notes).read_bytes() == SMALL


@pytest.mark.parametrize(
    ("status", "code", "token", "message"),
    [
        (401, "RepoNotFound", "", r"some/Model-GGUF does not exist, or is private \(401\): give a token of .*HF_TOKEN"),
        (401, "", "secret", r"does not exist, or the access token is invalid or has no access \(401\)"),
        (403, "GatedRepo", "", r"is gated \(403\): accept its terms on its page, and give a token"),
        (403, "", "secret", r"access to some/Model-GGUF is refused \(403\)"),
        (404, "RepoNotFound", "secret", r"there is no repository some/Model-GGUF \(404\)"),
        (503, "", "", r"some/Model-GGUF: the server replied 503 Service Unavailable; try again later"),
    ],
)
def test_refusals_of_the_hub(
    server: HubServer, hub: Hub, notes: Notes, status: int, code: str, token: str, message: str
) -> None:
    server.refusals[REPOSITORY] = status, code
    with pytest.raises(HubError, match=message):
        fetch_model(Hub(endpoint=server.url, folder=hub.folder, token=token), REPOSITORY, "", notes)


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        (f"{REPOSITORY}:Q5_K_M", "", "has no model with the quantization 'Q5_K_M'; it has: Q8_0, Q4_K_M"),
        (REPOSITORY, "m-Q4_KM.gguf", r"has no file 'm-Q4_KM\.gguf'; the nearest is m-Q4_K_M\.gguf"),
        ("some/weights", "", "some/weights has no GGUF files"),
    ],
)
def test_files_that_a_repository_lacks(hub: Hub, notes: Notes, name: str, file: str, message: str) -> None:
    with pytest.raises(HubError, match=message):
        fetch_model(hub, name, file, notes)


def test_a_part_that_a_repository_lacks(server: HubServer, hub: Hub, notes: Notes) -> None:
    del server.files["other/Split"]["big/big-Q8_0-00002-of-00003.gguf"]
    with pytest.raises(HubError, match=r"is one of 3 files, of which 1 are missing"):
        fetch_model(hub, "other/Split", "", notes)


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>Log in to the network</html>",
        b"[]",
        b'{"sha": "../../.."}',
        b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "lfs": {"sha256": "../../../../file"}}]}',
        b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "blobId": "../../../../file"}]}',
        b'{"sha": "a", "siblings": [{"rfilename": "m.gguf", "size": "large"}]}',
    ],
)
def test_a_reply_that_is_no_listing(server: HubServer, hub: Hub, notes: Notes, listing: bytes) -> None:
    server.listing = listing
    with pytest.raises(HubError, match=f"{REPOSITORY}: {server.url} replied with something other than a list of files"):
        fetch_model(hub, REPOSITORY, "", notes)
    assert not server.downloads()


def test_odd_names_of_files(server: HubServer, hub: Hub, notes: Notes) -> None:
    names = (
        "../../../../m.gguf",
        "/tmp/m.gguf",
        "m\x1b[31m.gguf",
        "m-Q8_0-00001-of-00000.gguf",
        "100%25 a#b?c-Q4_0.gguf",
    )
    server.files[REPOSITORY] = dict.fromkeys(names, SMALL)
    path = fetch_model(hub, f"{REPOSITORY}:Q4_0", "", notes)
    assert (path.name, path.read_bytes()) == (names[-1], SMALL)
    assert any(asked.path.endswith(f"/{names[-1]}") for asked in server.downloads())
    assert fetch_model(hub, REPOSITORY, names[3], notes).read_bytes() == SMALL
    with pytest.raises(HubError, match="has no file"):
        fetch_model(hub, REPOSITORY, names[0], notes)


def test_no_space_is_found_before_the_download(
    server: HubServer, hub: Hub, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(LARGE) - 1))
    message = r"needs 0\.00 GB, but .* has 0\.00 GB free; paceline models rm"
    with pytest.raises(HubError, match=message):
        fetch_model(hub, REPOSITORY, "", notes)
    with pytest.raises(HubError, match=message):
        fetch_url(hub, f"{server.url}/cdn/{REPOSITORY}/m-Q4_K_M.gguf", "", notes)
    assert not server.downloads()


def test_the_cache_serves_while_the_hub_cannot_be_reached(server: HubServer, hub: Hub, notes: Notes) -> None:
    path = fetch_model(hub, f"{REPOSITORY}:Q8_0", "", notes)
    away = Hub(endpoint="http://127.0.0.1:1", folder=hub.folder)
    assert fetch_model(away, f"{REPOSITORY}:Q8_0", "", notes) == path
    assert len(notes) == 1
    assert notes[0].endswith("The cached m-Q8_0.gguf is used.")
    with pytest.raises(HubError, match=r"other/Split: cannot connect: Connection refused; .*use --offline"):
        fetch_model(away, "other/Split", "", notes)
    offline = Hub(endpoint=server.url, folder=hub.folder, offline=True)
    with pytest.raises(HubError, match=r"other/Split is not in the cache .*, and --offline forbids the download"):
        fetch_model(offline, "other/Split", "", notes)
    with pytest.raises(HubError, match=r"'Q4_K_M'; it has: Q8_0"):
        fetch_model(offline, f"{REPOSITORY}:Q4_K_M", "", notes)


# ── URLs ──


def test_a_url_is_downloaded_again_only_after_a_change(
    server: HubServer, hub: Hub, notes: Notes, tmp_path: Path
) -> None:
    url = f"{server.url}/cdn/{REPOSITORY}/m-Q8_0.gguf?key=secret"
    path = fetch_url(hub, url, "", notes)
    assert (path.name, path.read_bytes()) == ("m-Q8_0.gguf", SMALL)
    assert fetch_url(hub, url, "", notes) == path
    assert len(server.downloads()) == 1
    server.files[REPOSITORY]["m-Q8_0.gguf"] = LARGE
    assert fetch_url(hub, url, "", notes).read_bytes() == LARGE
    target = tmp_path / "folder" / "mine.gguf"
    assert fetch_url(hub, url, str(target), notes) == target
    assert target.read_bytes() == LARGE
    offline = Hub(endpoint="http://127.0.0.1:1", folder=hub.folder, offline=True)
    assert fetch_url(offline, url, "", notes) == path
    with pytest.raises(HubError, match=r"m-Q4_K_M\.gguf, and --offline forbids the download"):
        fetch_url(offline, url.replace("Q8_0", "Q4_K_M"), "", notes)
    assert not notes
    (own := tmp_path / "own.gguf").write_bytes(b"GGUF own")
    assert fetch_url(hub, url, str(own), notes).read_bytes() == b"GGUF own"
    assert "is not known to be a download" in notes[0]


def test_a_url_with_redirect_parts_and_hash(server: HubServer, hub: Hub, notes: Notes) -> None:
    first = f"{server.url}/other/Split/resolve/main/{next(iter(SPLIT))}"
    path = fetch_url(hub, first, "", notes)
    assert {each.name for each in path.parent.glob("*.gguf")} == {Path(name).name for name in SPLIT}
    server.damaged = True
    with pytest.raises(HubError, match="was damaged in transfer and is removed"):
        fetch_url(hub, f"{server.url}/{REPOSITORY}/resolve/main/m-Q8_0.gguf", "", notes)
    with pytest.raises(
        HubError, match=r"there is no http://127\.0\.0\.1:\d+/some/Model-GGUF/resolve/main/n\.gguf \(404\)"
    ):
        fetch_url(hub, f"{server.url}/{REPOSITORY}/resolve/main/n.gguf?key=1", "", notes)


# ── the cache ──


def test_cached_models_are_listed_and_removed(server: HubServer, hub: Hub, notes: Notes) -> None:
    fetch_model(hub, REPOSITORY, "", notes)
    fetch_model(hub, f"{REPOSITORY}:Q8_0", "", notes)
    fetch_model(hub, "other/Split", "", notes)
    fetch_url(hub, f"{server.url}/cdn/{REPOSITORY}/m-Q8_0.gguf", "", notes)
    sizes = {model.name: model.size for model in cached_models(hub)}
    assert sizes == {
        "other/Split:Q8_0": sum(map(len, SPLIT.values())),
        f"{REPOSITORY}:Q4_K_M": len(LARGE),
        f"{REPOSITORY}:Q8_0": len(SMALL),
        "m-Q8_0.gguf": len(SMALL),
    }
    assert remove_model(hub, f"{REPOSITORY}:q8_0") == len(SMALL)
    assert remove_model(hub, "m-Q8_0.gguf") == len(SMALL)
    assert remove_model(hub, "other/Split") == sum(map(len, SPLIT.values()))
    assert [model.name for model in cached_models(hub)] == [f"{REPOSITORY}:Q4_K_M"]
    with pytest.raises(HubError, match=f"nothing/here is not in the cache .* has: {REPOSITORY}:Q4_K_M"):
        remove_model(hub, "nothing/here")
    (left := hub.folder / "models--some--Model-GGUF" / "blobs" / "x.1.incomplete").write_bytes(b"12345")
    assert (remove_partial_files(hub), left.exists()) == (5, False)


# ── the commands ──


def test_serve_downloads_and_names_the_model_by_its_repository(
    server: HubServer, hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_CACHE", str(hub.folder))
    monkeypatch.setenv("MODEL_ENDPOINT", server.url)
    served: list[Options] = []

    def run(options: Options) -> int:
        served.append(options)
        return 0

    monkeypatch.setattr("api.__main__.run", run)
    assert main(["serve", "-hf", f"{REPOSITORY}:Q8_0", "-hfd", "other/Split", "-md", next(iter(SPLIT))]) == 0
    (options,) = served
    assert Path(options.model.path).read_bytes() == SMALL
    assert Path(options.draft.path).name == "big-Q8_0-00001-of-00003.gguf"
    assert options.server.alias == (f"{REPOSITORY}:Q8_0",)
    assert main(["serve", "-hf", f"{REPOSITORY}:Q2_K"]) == 1
    assert main(["serve", "-hff", "m.gguf", "-m", "x.gguf"]) == 1
    assert main(["serve", "-hf", "model"]) == 2
    assert main(["models"]) == 0
    assert main(["models", "rm", f"{REPOSITORY}:Q8_0"]) == 0
    assert main(["models", "rm", f"{REPOSITORY}:Q8_0"]) == 1
    assert main(["serve", "--cache-list"]) == 0
    out, err = capfd.readouterr()
    assert f"{REPOSITORY}:Q8_0    0.00 MB  {hub.folder}" in out
    for line in (
        "has no model with the quantization 'Q2_K'; it has: Q8_0, Q4_K_M",
        "-hff m.gguf names a file in a repository: name the repository with -hf",
        "-hf: expected a repository like user/model or user/model:Q4_K_M, not 'model'",
        f"Removed {REPOSITORY}:Q8_0: 0.00 MB",
    ):
        assert line in err
