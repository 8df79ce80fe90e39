"""The bundle for a GPU host, models of random weights, the search for CUDA, random acceptance, and tables."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from bench import step_cost
from bench.gpu import build, bundle, measure, models, synthetic, tables
from bench.models import SOURCES, SetupError
from bench.peers import PACKAGE, pinned
from engine.config import EngineConfig
from engine.llama import open_gguf
from engine.sampling import Sampler

ROOT = Path(__file__).parents[1]
LLAMA = "vendor/llama.cpp"


# ── the bundle ──


@pytest.mark.parametrize(
    "path",
    [
        "CMakeLists.txt",
        "llama_cpp/llama_cpp.py",
        f"{LLAMA}/ggml/src/ggml.c",
        f"{LLAMA}/ggml/src/ggml-cuda/template-instances/mmq-instance-q4_0.cu",
        f"{LLAMA}/ggml/src/ggml-cpu/arch/x86/quants.c",
        f"{LLAMA}/tools/server/server.cpp",
        f"{LLAMA}/tools/mtmd/models/llava.cpp",
        f"{LLAMA}/tools/ui/CMakeLists.txt",
        f"{LLAMA}/scripts/ui-assets.cmake",
        f"{LLAMA}/vendor/nlohmann/json.hpp",
    ],
)
def test_files_of_the_build_are_kept(path: str) -> None:
    assert bundle.kept(path)


@pytest.mark.parametrize(
    "path",
    [
        "docs/index.md",
        "examples/server/server.py",
        "tests/test_llama.py",
        f"{LLAMA}/models/ggml-vocab-gpt-2.gguf",
        f"{LLAMA}/docs/build.md",
        f"{LLAMA}/tests/test-backend-ops.cpp",
        f"{LLAMA}/ggml/src/ggml-vulkan/ggml-vulkan.cpp",
        f"{LLAMA}/ggml/src/ggml-hip/CMakeLists.txt",
        f"{LLAMA}/tools/server/tests/unit/test_basic.py",
        f"{LLAMA}/tools/mtmd/test-2.mp3",
        f"{LLAMA}/tools/ui/src/app.css",
        f"{LLAMA}/scripts/hf.sh",
        f"{LLAMA}/CMakeLists.txt.orig",
    ],
)
def test_other_files_are_dropped(path: str) -> None:
    assert not bundle.kept(path)


def test_an_sdist_is_trimmed(tmp_path: Path) -> None:
    sdist, target = tmp_path / "sdist.tar.gz", tmp_path / "trimmed.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for name in ("CMakeLists.txt", f"{LLAMA}/src/llama.cpp", f"{LLAMA}/docs/build.md"):
            archive.addfile(info := tarfile.TarInfo(f"toy-1.0/{name}"), io.BytesIO(b"x" * info.size))
    assert bundle.trim(sdist, target) == 2
    with tarfile.open(target) as archive:
        assert archive.getnames() == ["toy-1.0/CMakeLists.txt", f"toy-1.0/{LLAMA}/src/llama.cpp"]
    assert not list(tmp_path.glob("*.part"))


def test_the_lock_has_every_dependency_and_a_hash_for_each() -> None:
    locked = bundle.locked()
    names = {requirement.partition("==")[0] for requirement in locked}
    for requirement in bundle.requirements():
        assert requirement.split(">")[0].split("=")[0].split("[")[0].split(";")[0].strip() in names
    assert f"{PACKAGE}=={pinned()}" in locked, "python -m bench.gpu.bundle lock"
    assert all(len(line.partition("--hash=sha256:")[2]) == 64 for line in locked.values())


def test_the_archive_unpacks_to_one_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/one.py", "two.md"):
        (tmp_path / name).write_text(name)
    target = tmp_path / "build" / "toy.tar.gz"
    assert bundle.pack(target, [tmp_path / "two.md", tmp_path / "a" / "one.py"], tmp_path) == target.stat().st_size
    with tarfile.open(target) as archive:
        assert archive.getnames() == ["paceline/a/one.py", "paceline/two.md"]


def test_nothing_of_the_bundle_is_committed() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"{bundle.PARTS_FOLDER.name}/", f"{bundle.ARCHIVE.parent.name}/"} <= set(ignored)


# ── models of random weights ──


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the path of a GGUF with SmolLM2's vocabulary and no tensors."""
    return models.write_tokenizer(SOURCES["smollm2"].path, tmp_path_factory.mktemp("gpu") / "tokenizer.gguf")


def test_a_vocabulary_travels_without_weights(tokenizer: Path) -> None:
    assert tokenizer.stat().st_size < 3e6


@pytest.mark.parametrize("kind", list(models.WEIGHT_TYPES))
def test_the_library_computes_a_random_model(tokenizer: Path, tmp_path: Path, kind: str) -> None:
    path = models.write(tmp_path / "toy.gguf", models.SHAPES["tiny"], kind, tokenizer)
    backend = open_gguf(EngineConfig.of(path=path, slots=2, context=256), lambda share: None, lambda: True)
    try:
        assert backend.info.chat_template is not None
        assert "im_start" in backend.info.chat_template
        ids = backend.vocab.tokenize("Once upon a time<|im_end|>", special=True)
        assert ids[-1] in backend.vocab.ends
        context = backend.context
        context.batch.add(0, 0, ids, len(ids))
        logits = context.decode().astype(np.float64)
    finally:
        backend.close()
    deviation = logits.std(axis=1)
    assert ((deviation > models.LOGIT_DEVIATION / 2) & (deviation < 2 * models.LOGIT_DEVIATION)).all()
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert 0.02 < np.median(1 / chances.sum(axis=1)) < 0.98, (
        "the likeliest token has neither all nor almost no probability"
    )
    assert len({*logits.argmax(axis=1).tolist()}) > 1, "logits depend on the history"


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(SystemExit, match="unknown model '9b:q4_0': expected one of tiny"):
        models.parse("9b:q4_0")


# ── CUDA on the host ──


def toolkit(top: Path) -> Path:
    """Creates a folder like that of CUDA's toolkit, without cuBLAS."""
    for name in ("include", "lib64", "bin"):
        (top / name).mkdir(parents=True)
    return top


def blas(folder: Path, libraries: str) -> Path:
    """Adds cuBLAS's header and libraries to a folder."""
    for path in (folder / "include" / "cublas_v2.h", *(folder / libraries / f"{n}.13" for n in build.CUDA_LIBRARIES)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_cublas_of_the_toolkit_comes_first(tmp_path: Path) -> None:
    top = blas(toolkit(tmp_path / "cuda"), "lib64")
    blas(tmp_path / "site-packages" / "nvidia" / "cu13", "lib")
    assert build.cublas(top, [tmp_path / "site-packages"]) == (top / "include", top / "lib64")


def test_cublas_of_a_wheel_is_found_and_linked_without_its_version(tmp_path: Path) -> None:
    folder = blas(tmp_path / "site-packages" / "nvidia" / "cu13", "lib")
    headers, libraries = build.cublas(toolkit(tmp_path / "cuda"), [tmp_path / "empty", tmp_path / "site-packages"])
    assert (headers, libraries) == (folder / "include", folder / "lib")
    for _ in range(2):
        build.link(sorted(libraries.glob("libcublas*")), tmp_path / "links")
    assert {path.name for path in (tmp_path / "links").iterdir()} == {
        "libcublas.so",
        "libcublas.so.13",
        "libcublasLt.so",
        "libcublasLt.so.13",
    }
    assert (tmp_path / "links" / "libcublas.so").resolve() == libraries / "libcublas.so.13"


def test_the_error_without_cublas_names_the_variable(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"set \$CUBLAS to its folder"):
        build.cublas(toolkit(tmp_path / "cuda"), [])


@pytest.mark.parametrize("name", ["build.sh", "run.sh"])
def test_the_scripts_are_valid_bash(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu" / name)], check=False).returncode == 0


# ── random acceptance ──


class FixedSampler(Sampler):
    """A sampler that always returns token 9."""

    def __init__(self) -> None:
        pass

    def sample(self, *_: object, **__: object) -> int:
        return 9


@pytest.mark.parametrize(("rate", "picked"), [(1.0, [3, 4, 9]), (0.0, [9, 9, 9])])
def test_draft_tokens_are_accepted_at_random(rate: float, picked: list[int]) -> None:
    sampler = synthetic.RandomAcceptanceSampler(FixedSampler(), (3, 4), 5, rate, Random(0))
    row = np.zeros(10, np.float32)
    assert [sampler.sample(row, range(length), 1) for length in (5, 6, 7)] == picked


def test_the_rates_of_llama_server_are_cumulative() -> None:
    assert synthetic.rates(0.5, 3) == "0.500000,0.250000,0.125000"


# ── measurements and tables ──


def test_rows_are_divided_evenly() -> None:
    assert step_cost.divide_rows(3, 8) == [(0, 1), (1, 1), (2, 1)]
    assert step_cost.divide_rows(5, 2) == [(0, 3), (1, 2)]


def test_a_cell_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESULTS_FOLDER", tmp_path)
    for value in (1, 2):
        measure.PartFigures("share", "1b:q4_0").fill("8", lambda value=value: value)  # type: ignore[misc]
    assert msgspec.json.decode((tmp_path / "share-1b-q4_0.json").read_bytes()) == {"8": 1}


def test_every_part_has_a_table() -> None:
    assert set(tables.PART_TABLES) == set(measure.MEASUREMENTS)
    report = {
        "tokens_per_second": 100.0,
        "failed": 0,
        "ttft_ms": {"p50": 1.0, "p99": 2.0},
        "gap_ms": {},
    }
    share = {"bare": 200.0, "greedy": 150.0, "sampled": 100.0, "share_greedy": 0.1, "share_sampled": 0.2}
    rendered = tables.render_tables(
        {
            "cost-1b-q4_0": {"step": {"decode": {"0": {"1": 2.0, "512": 9.0}}}},
            "share-1b-q4_0": {"8": share},
            "serve-1b-q4_0": {"8 paceline": report},
            "sampling-1b-q4_0": {"8 paceline -bs on": report},
            "synthetic-1b-q4_0": {"8 paceline, measured lengths": report},
            "gaps-1b-q4_0": {"paceline": {"prompt_seconds": 1.5}},
            "gaps-8b-q4_0": {},
        }
    )
    titles = [line for line in rendered.splitlines() if line.startswith("**")]
    assert titles == [f"**1b-q4_0: {title}**" for title, _ in tables.PART_TABLES.values()]
    assert "| paceline, measured lengths | 8 | 100.00 | 1.00 | 2.00 | nan | nan | 0 |" in rendered
    assert "| 8 | 200.00 | 75.00 | 50.00 | 10.00 | 20.00 |" in rendered
