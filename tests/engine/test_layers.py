"""Imports point downward only, and each package imports only the libraries of its layer."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ENGINE = """
batch text checksummed splitmix background devices adapters worker_pool sampling_params fairness histogram
backend_sampling
backend
grammar media draft_head branching
contract
config outbox message_link
contents
kv sampling pace scheduler
llama
speculate
sequence generation sim stats validation loaded_adapters rollback
verify waiting slots running watchdog time_limits embedding_queue
embedding lifecycle
backend_picks media_prefill
output_processor
step_execution
step measured_costs
commands
thread
slotfiles
core_client
local_core
core_messages
core_server
core_process
engine
diagnosis
"""
GRAMMAR = "spec pointer tokenizer jobs\nschema gbnf matcher\nmasks relax\ncompiler"
SAMPLING = """
accept noise row_maxima reasoning repeats truncate temperature
candidates
logprobs penalties feedback infill stages
row_picks
sampler row_candidates
"""
KV = """
tree record idle placement
block disk sequence_file
tier block_tree allocation residents
offload reuse
offloader changes
eviction
allocator transfer
cache
"""
PACE = "curve acceptance step_log recurrent_passes\npasses\ncost lengths\ncalibration alternatives\nchooser"
SPECULATE = """
proposer proposer_stats vocabulary
ngram_index ngram_counts ngram_mod suffix_tree sampled_draft tracked_proposer
ngram_simple ngram_map ngram_cache suffix prediction grammar draft_model mtp sequence_proposers
shared_data planner lookup
speculative_decoding
"""
LLAMA = """
library gguf_file row_positions layout special_tokens
exact fit gguf_check params placement threads state
weights
top_k_chains
decoder memory_check rollback
shift adapters saved_states
vocab context textless
branches mtp_layer
mtp_head mtp_layers
mtp
model
embedding mtmd
"""
CONFIG = "machine batch model adapters loading media rope cpu sim embedding\nmemory speculation\nengine"
MEDIA = "values\nsound_check\nfile_check encoder\nreader"
SIM = "hashing vocab costs\ncontext proposer\nbackend"


@cache
def imports(path: Path) -> frozenset[str]:
    """Returns the full names of the modules that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return frozenset(found)


def importers(package: str, *modules: str) -> list[str]:
    """Returns the files of a package that import one of `modules` or a module inside of it."""
    inside = tuple(f"{module}." for module in modules)
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / package).rglob("*.py"))
        if any(f"{name}.".startswith(inside) for name in imports(path))
    ]


def upward(package: str, layers: str) -> list[str]:
    """Returns the imports inside `package` that do not point to a lower layer; a folder counts as one module."""
    rank = {name: level for level, line in enumerate(layers.strip().split("\n")) for name in line.split()}
    folder = ROOT / package.replace(".", "/")
    wrong: list[str] = []
    for path in sorted(folder.rglob("*.py")):
        own = path.relative_to(folder).with_suffix("").parts[0]
        if own == "__init__":
            continue
        assert own in rank, f"{path} has no layer"
        for name in imports(path):
            parts = name.removeprefix(package + ".").split(".")
            if name.startswith(package + ".") and parts[0] in rank and parts[0] != own and rank[parts[0]] >= rank[own]:
                wrong.append(f"{package}.{own} -> {name}")
    return wrong


@pytest.mark.parametrize(
    ("package", "layers"),
    [
        ("engine", ENGINE),
        ("engine.kv", KV),
        ("engine.grammar", GRAMMAR),
        ("engine.sampling", SAMPLING),
        ("engine.pace", PACE),
        ("engine.llama", LLAMA),
        ("engine.speculate", SPECULATE),
        ("engine.config", CONFIG),
        ("engine.sim", SIM),
        ("engine.media", MEDIA),
    ],
)
def test_imports_point_down(package: str, layers: str) -> None:
    lazily = ["engine.thread -> engine.llama"]
    assert [line for line in upward(package, layers) if line not in lazily] == []


def test_only_the_llama_package_imports_the_native_library() -> None:
    assert {Path(path).parent.name for path in importers("engine", "llama_cpp")} == {"llama"}


def test_the_engine_imports_no_http() -> None:
    assert importers("engine", "api", "starlette", "uvicorn", "httptools") == []


def test_the_api_imports_no_llama() -> None:
    assert importers("api", "llama_cpp", "engine.llama") == []


def test_files_classes_and_functions_stay_small() -> None:
    """Files have at most 350 lines, classes 250 and functions 60, except in tests."""
    long: list[str] = []
    for package in ("engine", "api", "bench"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            if (lines := text.count("\n")) > 350:
                long.append(f"{path}: {lines} lines")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    size = (node.end_lineno or 0) - node.lineno
                    if size > (250 if isinstance(node, ast.ClassDef) else 60):
                        long.append(f"{path}: {node.name} has {size} lines")
    assert long == []
