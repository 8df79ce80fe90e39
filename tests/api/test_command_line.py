"""Command lines of llama-server: every spelling has an answer, and values are read as llama-server reads them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from api.__main__ import main
from api.commands.flags import every_spelling
from api.commands.printing import completion_script, devices_text
from api.config.arguments import SPELLED
from api.config.command_line import OptionError, parse
from api.config.flags import FLAGS, Flag
from api.config.other_flags import OtherFlag
from api.config.refused import REFUSED
from api.config.without_effect import WITHOUT_EFFECT
from bench.peer_flags import PeerFlag, format_list, parse_help, parse_list
from engine import DeviceInfo

PEER_FLAGS = parse_list((Path(__file__).parent / "peer_flags.txt").read_text().splitlines())
VARIABLES = {name for flag in FLAGS for name in (flag.env, *flag.older_env)}
VARIABLES |= {option.env for option, _ in SPELLED.values()}


def settings(line: str, *dests: str) -> Any:
    """Returns the values of the settings after a command line, one value alone."""
    options = parse(shlex.split(line))
    values = tuple(getattr(getattr(options, table), field) for table, field in (dest.split(".") for dest in dests))
    return values if len(dests) > 1 else values[0]


def test_every_spelling_of_llama_server_is_known() -> None:
    assert [name for flag in PEER_FLAGS for name in flag.names if name not in SPELLED] == []
    assert [flag.env for flag in PEER_FLAGS if flag.env not in VARIABLES] == []
    assert len([name for flag in PEER_FLAGS for name in flag.names]) > 400


def test_flags_take_as_many_values_as_in_llama_server() -> None:
    def arity(name: str) -> int:
        option, _ = SPELLED[name]
        return option.arity

    different = [name for flag in PEER_FLAGS for name in flag.names if arity(name) != flag.arity]
    # Switches here take the 0 or 1 that follows, and -bs may have a value.
    optional = {name for name in different if arity(name) == 0 and isinstance(SPELLED[name][0], Flag)}
    assert {*different} - optional == {"-bs", "--backend-sampling"}


def test_the_list_is_made_from_the_help() -> None:
    help_text = """
----- common params -----

-hf,   -hfr, --hf-repo <user>/<model>[:quant]
                                        repository
                                        (env: LLAMA_ARG_HF_REPO)
--range START END                       layers
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
--perf, --no-perf                       timings
"""
    flags = parse_help(help_text.splitlines())
    assert flags == [
        PeerFlag(("-hf", "-hfr", "--hf-repo"), 1, "LLAMA_ARG_HF_REPO"),
        PeerFlag(("--range",), 2, ""),
        PeerFlag(("-ot", "--override-tensor"), 1, ""),
        PeerFlag(("--perf", "--no-perf"), 0, ""),
    ]
    assert parse_list(format_list(flags)) == flags


def test_flags_without_effect() -> None:
    words = [word for flag in WITHOUT_EFFECT for name in flag.names for word in (name, *["1"] * flag.arity)]
    variables = {flag.env: "1" for flag in WITHOUT_EFFECT if flag.env}
    assert parse(["-m", "x", *words], variables) == parse(["-m", "x"])


@pytest.mark.parametrize("flag", REFUSED, ids=lambda flag: flag.names[-1])
def test_refused_flags(flag: OtherFlag) -> None:
    for name in flag.names:
        with pytest.raises(OptionError, match=": ") as caught:
            parse(["-m", "x", name, *["y"] * flag.arity])
        assert str(caught.value) == f"{'/'.join(flag.names)}: {flag.reason}"
    if flag.env:
        with pytest.raises(OptionError, match=flag.env):
            parse(["-m", "x"], {flag.env: "y" if flag.arity else "1"})
        assert parse(["-m", "x"], {flag.env: flag.harmless[-1] if flag.harmless else ""}) == parse(["-m", "x"])
    for value in flag.harmless:
        parse(["-m", "x", flag.names[0], value])
    if not flag.arity:
        parse(["-m", "x", flag.names[0], "off"])


def test_every_other_flag_has_one_sentence() -> None:
    for flag in (*WITHOUT_EFFECT, *REFUSED):
        assert flag.reason[0].islower() or flag.reason.startswith(("GET", "-"))
        assert not flag.reason.endswith(".")
        assert len(flag.reason) < 100


@pytest.mark.parametrize(
    ("line", "dest", "value"),
    [
        ("-t -1 -c4096", "batch.context", 4096),
        ("--threads=-1 -ngl=7", "model.gpu_layers", 7),
        ("-ngl99", "model.gpu_layers", 99),
        ("-ngl auto -ngl all", "model.gpu_layers", -1),
        ("-np 3 --parallel -1", "batch.slots", 0),
        ("--seed -1", "sampling.seed", None),
        ("-fit off", "model.fit", "off"),
        ("-fit", "model.fit", "on"),
        ("--fit=1", "model.fit", "on"),
        ("-fa", "model.flash_attention", "on"),
        ("-fa --warmup", "model.flash_attention", "on"),
        ("-fa on", "model.flash_attention", "on"),
        ("-bs --warmup", "model.backend_sampling", "on"),
        ("-bs off", "model.backend_sampling", "off"),
        ("-fa 0", "model.flash_attention", "off"),
        ("-fa -1", "model.flash_attention", "auto"),
        ("--flash_attn enabled", "model.flash_attention", "on"),
        ("-no-kvu", "model.kv_unified", False),
        ("--kv-unified off", "model.kv_unified", False),
        ("--no-kv-unified=false", "model.kv_unified", True),
        ("--context-shift 1 -c 9", "batch.context_shift", True),
        ("--sse-ping-interval -1", "server.sse_ping", 0.0),
        ("-a a,b --alias c", "server.alias", ("a", "b", "c")),
        ("--temp .5 --temp 1e-1", "sampling.temperature", 0.1),
        ("-rea off", "chat.reasoning", "off"),
        ("--reasoning-effort default", "chat.reasoning_effort", ""),
        ("--no-reasoning-preserve", "chat.preserve_reasoning", False),
        ("--reasoning-budget-message -fine", "chat.reasoning_budget_message", "-fine"),
        ("--jinja on --no-prefill-assistant", "chat.prefill_assistant", False),
    ],
)
def test_values_as_llama_server_reads_them(line: str, dest: str, value: object) -> None:
    assert settings(f"-m x {line}", dest) == value


def test_variables_that_turn_switches_off() -> None:
    assert parse(["-m", "x"], {"LLAMA_ARG_NO_WARMUP": "1"}).model.warmup is True  # llama-server has no such variable
    assert parse(["-m", "x"], {"LLAMA_ARG_NO_PREFILL_ASSISTANT": "0"}).chat.prefill_assistant is False
    assert parse(["-m", "x"], {"LLAMA_ARG_DRAFT_MAX": "5"}).draft.n_max == 5


# Command lines of public posts, with file names made short.
SERVED_LINES = {
    "issue-1": '--model T.gguf --alias "unsloth/GLM-4.7" --threads -1 --fit on --prio 3 --temp 1.0 --top-p 0.95 '
    "--ctx-size 16384 --port 8001 --jinja",
    "issue-2": "--model T.gguf --model-draft D.gguf --threads -1 --fit on --prio 3 --temp 1.0 --top-p 0.95 "
    "--ctx-size 16384 --ctx-size-draft 16384 --jinja --device CUDA0 --device-draft CUDA0,CUDA1",
    "draft": "-m T.gguf -md D.gguf -ngl 99 -ngld 99 --draft-max 16 --draft-min 1 --draft-p-min 0.8 -fa on -c 32768 "
    "-ctk q8_0 -ctv q8_0 --jinja --no-mmap --mlock",
    "server-pull-request": "-m T.gguf -ngl 99 --host 0.0.0.0 --port 8999 -md D.gguf -ngld 99 --draft-max 10 "
    "--draft-min 10",
    "new-draft-flags": "--model T.gguf --model-draft D.gguf --spec-type draft-simple --spec-draft-n-max 16 "
    "--spec-draft-n-min 4 --spec-draft-p-min 0.4 --device-draft CUDA0 --spec-draft-ngl 99",
    "ngram-mod": "-m T.gguf --spec-type ngram-mod --spec-ngram-mod-n-match 24 --spec-ngram-mod-n-min 48 "
    "--spec-ngram-mod-n-max 64 -np 2 --no-webui --metrics -cb",
    "ngram-map": "-m T.gguf --spec-type ngram-map-k4v --spec-ngram-size-n 8 --spec-ngram-size-m 8 "
    "--spec-ngram-min-hits 2 --draft-max 64",
    "experts-on-cpu": r"-m T.gguf -c 32768 -ngl 999 -fa on -t 16 -b 4096 -ub 4096 --jinja --no-mmap "
    r'-ot "blk\.([0-9]|[1-2][0-9]|30)\.=CUDA0,exps=CPU"',
    "n-cpu-moe": "-m T.gguf --n-cpu-moe 30 -ngl 99 -fa 1 -c 65536 --cache-type-k q8_0 --cache-type-v q8_0 "
    "--no-context-shift --no-mmap --temp 0.7 --top-k 20 --min-p 0 --cache-reuse 256 --slots --props",
    "ik-deepseek": "-m T.gguf -rtr -fmoe -mla 2 -amb 512 -ot exps=CPU -fa -c 32768 -ngl 63 --parallel 1 --threads 16 "
    "--host 127.0.0.1 --port 8080",
    "ik-draft": "-m T.gguf -md D.gguf -ngld 99 -fa -fmoe -ger -gr -khad -ctk q8_0 -ctv q8_0 -ps 0.1 -td 8 -cd 8192 "
    "-ooae -muge -sas -smgs -cuda fusion=1 -crs 0.9 -cram-n-min 64 --draft-p-min 0.85",
    "samplers": "-hf unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M -n 512 --samplers top_k;temperature -s 42 --mirostat 2 "
    "--numa distribute -tb 8 --poll 50 --log-file server.log -to 600 --api-key-file keys.txt",
}
REFUSED_LINES = {
    "--models-dir models --models-max 2": "--models-dir: one server serves one model: put llama-swap in front",
    "-m T.gguf -ser 6,1 -mla 2": "-ser/--smart-expert-reduction: all experts of the model are used",
    "-m T.gguf -md D.gguf --spec-type draft,mtp": "--spec-type draft and draft-mtp cannot be used together",
    "-m T.gguf -md D.gguf --spec-type draft-eagle3": "--spec-type: draft-eagle3 needs inputs of the model's layers",
    "-m T.gguf -sm graph": "-sm/--split-mode: expected one of layer, none, row, tensor, not 'graph'",
    "-m T.gguf -ctk q8_KV": "-ctk/--cache-type-k: expected one of bf16, ",
    "-m T.gguf --no-flash-attn": "-no-fa/--no-fa/--no-flash-attn: use -fa off",
    "-m T.gguf --sleep-idle-seconds 60": "--sleep-idle-seconds: a loaded model stays in memory",
    "-m T.gguf -ngk 9": "unknown flag -ngk; the nearest is -ng",
    "-m T.gguf --port": "--port: expected one argument",
    "-m T.gguf --port --jinja": "--port: expected one argument",
    "-m T.gguf --control-vector-layer-range 4": "--control-vector-layer-range: expected 2 arguments",
    "--preset coder": "--preset names a section of an INI file: name the file with --models-preset",
}


@pytest.mark.parametrize("line", SERVED_LINES.values(), ids=SERVED_LINES)
def test_command_lines_of_public_posts(line: str) -> None:
    assert parse(shlex.split(line)).model.path


@pytest.mark.parametrize(("line", "message"), REFUSED_LINES.items(), ids=REFUSED_LINES)
def test_refused_command_lines(line: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(shlex.split(line))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


PRESETS = """
version = 1
[*]
c = 8192   ; for all
LLAMA_ARG_TOP_K = 5
no-warmup = true

[coder]
model = coder.gguf
n-gpu-layers = 99  # all
chat-template-kwargs = {"a": "b c"}
load-on-startup = coder
kv_unified = 1
[user/chat-GGUF:Q4_K_M]
c = 16384
jinja = true
[images]
m = x.gguf
tools = all
"""


def preset(tmp_path: Path, text: str, *arguments: str) -> Any:
    file = tmp_path / "models.ini"
    file.write_text(text)
    return parse(["--models-preset", str(file), *arguments], {"LLAMA_ARG_CTX_SIZE": "1", "LLAMA_ARG_TOP_P": "0.5"})


def test_a_preset(tmp_path: Path) -> None:
    text = PRESETS.replace("kv_unified", "kv-unified")
    options = preset(tmp_path, text, "--preset", "coder", "--top-k", "9")
    assert (options.model.path, options.model.gpu_layers, options.model.warmup) == ("coder.gguf", 99, False)
    assert (options.batch.context, options.sampling.top_k, options.sampling.top_p) == (8192, 9, 0.5)
    assert (options.server.alias, options.chat.template_kwargs) == (("coder",), '{"a": "b c"}')
    options = preset(tmp_path, text, "--preset", "user/chat-GGUF:Q4_K_M", "-a", "chat")
    assert (options.hub.repo, options.batch.context) == ("user/chat-GGUF:Q4_K_M", 16384)
    assert options.server.alias == ("chat",)
    assert preset(tmp_path, "\ufeffmodel = only.gguf").model.path == "only.gguf"


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (PRESETS, ["--preset", "coder"], "models.ini: [coder] has no key 'kv_unified'; the nearest is kv-unified"),
        (PRESETS, ["--preset", "images"], "models.ini: [images] tools: no tools run in the server"),
        (PRESETS, ["--preset", "codr"], "models.ini has no section [codr]; the nearest is coder"),
        (PRESETS, [], "choose a section with --preset (there are: coder, user/chat-GGUF:Q4_K_M, images)"),
        ("[a]\nnp = x", [], "models.ini: [a] np: expected a whole number from 0 to 256, not 'x'"),
        ("[a]\nwarmup = maybe", [], "models.ini: [a] warmup: --warmup takes no value: use --warmup or --no-warmup"),
        ("[a]\nwarmup", [], "models.ini is not INI: Source contains parsing errors"),
    ],
)
def test_errors_in_a_preset(text: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        preset(tmp_path, text, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shortcut() -> None:
    options = parse(["--fim-qwen-7b-spec", "--port", "9000"])
    assert (options.hub.repo, options.hub.file) == ("ggml-org/Qwen2.5-Coder-7B-Q8_0-GGUF", "qwen2.5-coder-7b-q8_0.gguf")
    assert (options.hub.draft_repo, options.server.port) == ("ggml-org/Qwen2.5-Coder-0.5B-Q8_0-GGUF", 9000)


def test_options_that_print(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "-m", "x", "--list-devices"]) == 0
    assert capsys.readouterr().out == "Available devices:\n  (none)\n"
    assert main(["serve", "--version"]) == 0
    assert capsys.readouterr().out.startswith("paceline 0.")
    assert main(["flags", "--all"]) == 0
    shown = capsys.readouterr().out
    assert every_spelling() in shown
    assert "| `--numa` |" in shown
    assert "| `--tools` | refused: no tools run in the server: " in shown
    assert "| `-cb` | no effect: requests are always batched continuously |" in shown
    assert " --ctx-size " in completion_script()
    devices = [DeviceInfo("CUDA0", "NVIDIA H200", 143771 * 2**20, 143000 * 2**20)]
    assert devices_text(devices) == "Available devices:\n  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)\n"
