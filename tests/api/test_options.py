"""Command line, environment and configuration file: every setting is parsed, and each error is one line."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from api.__main__ import USAGE, main
from api.commands.flags import flag_reference
from api.config.arguments import ALL_OPTIONS
from api.config.command_line import OptionError, parse
from api.config.flags import FLAGS, HEADINGS, Flag
from api.config.options import Options
from api.config.spellings import SPELLINGS
from engine import BatchConfig, SamplingParams

ROOT = Path(__file__).parents[2]

# Values with a form that the type does not have.
EXAMPLES: dict[str, Any] = {"template_kwargs": '{"a": 1}', "repo": "user/model:Q8_0", "draft_repo": "user/draft"}
EXAMPLES |= {"url": "https://host/model.gguf", "api_prefix": "/models", "json_schema": "{}", "samplers": "top_k"}
EXAMPLES |= {"otlp_traces_endpoint": "http://127.0.0.1:4318/v1/traces", "mmproj_url": "https://host/mmproj.gguf"}
EXAMPLES |= {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5558"}
EXAMPLES |= {"sampler_seq": "k", "logit_bias": ("15043+1",), "n_min": 5, "mod_min": 30}
# The text of these files replaces another setting.
KEPT_FLAGS = [flag for flag in FLAGS if flag.field not in ("grammar_file", "json_schema_file")]
EXAMPLES |= {"mod_min": 5, "n_min": 5, "logit_bias": ("7-inf",), "samplers": "temperature;top_k", "sampler_seq": "tk"}
EXAMPLES |= {"grammar_file": __file__, "json_schema": "{}", "json_schema_file": str(ROOT / "tests/api/schema.json")}
FLAGS_WITH_VARIABLE = [flag for flag in FLAGS if flag.env]


def example(flag: Flag) -> Any:
    """Returns a valid value that is not the default."""
    return EXAMPLES[flag.field] if flag.field in EXAMPLES else value_of(flag.kind, flag.default)


def value_of(kind: inspect.Type, default: Any) -> Any:
    """Returns a value of a type that is not `default`."""
    match kind:
        case inspect.Metadata():
            return value_of(kind.type, default)
        case inspect.BoolType():
            return not default
        case inspect.LiteralType():
            return next(value for value in kind.values if value != default)
        case inspect.UnionType():
            return value_of(kind.types[0], default)
        case inspect.VarTupleType():
            return (value_of(kind.item_type, default[0] if default else None),)
        case inspect.TupleType():
            return tuple(value_of(item, None) for item in kind.item_types)
        case inspect.IntType() | inspect.FloatType():
            usual = 77 if isinstance(kind, inspect.IntType) else 0.5
            return next(
                value
                for value in (usual, kind.ge, kind.le, 1.5)
                if value is not None and is_valid(kind, value, default)
            )
    return "text"


def is_valid(kind: inspect.IntType | inspect.FloatType, value: float, default: Any) -> bool:
    low, high = -inf if kind.ge is None else kind.ge, inf if kind.le is None else kind.le
    return value != default and low <= value <= high and (kind.gt is None or value > kind.gt)


def value_in(options: Options, flag: Flag) -> Any:
    return getattr(getattr(options, flag.table), flag.field)


@pytest.mark.parametrize("flag", KEPT_FLAGS, ids=lambda flag: flag.dest)
def test_every_spelling_of_every_flag(flag: Flag) -> None:
    value = example(flag)
    for name in flag.off_names if value is False else flag.names:
        if flag.switch:
            arguments = [name]
        elif flag.repeatable:
            arguments = [word for item in value for word in (name, item)]
        else:
            arguments = [name, *map(str, value if flag.arity > 1 else [value])]
        assert value_in(parse(["-m", "model.gguf", *arguments]), flag) == value
        if name.startswith("--") and flag.arity == 1 and not flag.repeatable:
            assert (
                value_in(parse(["-m", "x", f"{name.replace('-', '_').replace('__', '--', 1)}={value}"]), flag) == value
            )


@pytest.mark.parametrize("flag", KEPT_FLAGS, ids=lambda flag: flag.dest)
def test_every_key_of_a_file(flag: Flag, tmp_path: Path) -> None:
    value = example(flag)
    shown = msgspec.json.encode(value).decode()
    lines = {"model": ['path = "m.gguf"'], **{table: [] for table in HEADINGS if table != "model"}}
    lines[flag.table] = [line for line in lines[flag.table] if flag.field != "path"] + [f"{flag.field} = {shown}"]
    file = tmp_path / "paceline.toml"
    file.write_text("\n".join(f"[{table}]\n" + "\n".join(body) for table, body in lines.items()))
    assert value_in(parse(["--config", str(file)]), flag) == value


@pytest.mark.parametrize("flag", FLAGS_WITH_VARIABLE, ids=lambda flag: flag.env)
def test_every_variable_of_the_environment(flag: Flag) -> None:
    value = example(flag)
    text = ",".join(value) if flag.repeatable else str(value).lower() if flag.switch else str(value)
    assert value_in(parse([] if flag.dest == "model.path" else ["-m", "x"], {flag.env: text}), flag) == value


@pytest.mark.parametrize("text", ["true", "1", "on", "enabled", "false", "0", "off", "disabled"])
def test_switches_in_the_environment(text: str) -> None:
    switches = [flag for flag in FLAGS_WITH_VARIABLE if flag.switch]
    options = parse(["-m", "x"], {flag.env: text for flag in switches})
    assert {value_in(options, flag) for flag in switches} == {text in ("true", "1", "on", "enabled")}


def test_defaults() -> None:
    options = parse(["-m", "model.gguf"], {"LLAMA_ARG_PORT": "", "LLAMA_ARG_SPEC_TYPE": ""})
    assert all(value_in(options, flag) == flag.default for flag in FLAGS if flag.dest != "model.path")


def test_the_command_line_overrides_the_environment_which_overrides_a_file(tmp_path: Path) -> None:
    file = tmp_path / "paceline.toml"
    file.write_text(
        '[model]\npath = "m.gguf"\nthreads = 3\n[batch]\nslots = 5\nrows = 64\n[server]\napi_keys = ["f"]\n'
    )
    environment = {"LLAMA_ARG_N_PARALLEL": "6", "LLAMA_ARG_BATCH": "128", "LLAMA_API_KEY": "a, b"}
    options = parse(["--config", str(file), "-np", "7"], environment)
    assert (options.model.path, options.model.threads) == ("m.gguf", 3)
    assert (options.batch.slots, options.batch.rows) == (7, 128)
    assert options.server.api_keys == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "types"),
    [
        (["--spec-type", "ngram-mod,suffix", "--spec-type", "draft"], ("ngram-mod", "suffix", "draft")),
        (["--spec-type=suffix, draft-simple,"], ("suffix", "draft")),
        (["--spec-type", "none"], ("none",)),
        (["--spec-type", "auto"], ("auto",)),
        (["--spec-type", ""], ()),
    ],
    ids=str,
)
def test_types_of_proposers(arguments: list[str], types: tuple[str, ...]) -> None:
    assert parse(["-m", "x", *arguments]).speculation.types == types


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("1.", 1.0), ("+0.5", 0.5), ("0.50", 0.5), ("1e-1", 0.1)])
def test_numbers_as_llama_server_takes_them(text: str, value: float) -> None:
    options = parse(["-m", "m.gguf", "--top-p", text, "-np", "+04"], {})
    assert options is not None
    assert (options.sampling.top_p, options.batch.num_slots) == (value, 4)


def test_several_values_in_one_flag() -> None:
    assert parse(["-m", "x", "--api-key", "a,b", "--api-key", "c"]).server.api_keys == ("a", "b", "c")
    assert parse(["-m", "x", "--dry-sequence-breaker", ","]).sampling.dry_sequence_breakers == (",",)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LLAMA_ARG_PORT": "x"}, "LLAMA_ARG_PORT: expected a whole number from 0 to 65535, not 'x'"),
        ({"LLAMA_ARG_FLASH_ATTN": "maybe"}, "LLAMA_ARG_FLASH_ATTN: expected one of auto, off, on, not 'maybe'"),
        ({"LLAMA_ARG_CONTEXT_SHIFT": "yes"}, "LLAMA_ARG_CONTEXT_SHIFT: expected on or off, not 'yes'"),
        ({"LLAMA_ARG_SPEC_TYPE": "sufix"}, "LLAMA_ARG_SPEC_TYPE: unknown value 'sufix'; the nearest is suffix"),
    ],
)
def test_errors_in_the_environment(
    environment: dict[str, str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    assert main(["serve", "-m", "x"]) == 2
    assert capsys.readouterr().err == f"paceline serve: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model is given: name a GGUF file with -m, or a repository with -hf"),
        (["-m"], "-m/--model: expected one argument"),
        (["-m", "x", "-np", "257"], "-np/--parallel: expected a whole number from 0 to 256, not '257'"),
        (["-m", "x", "-np", "many"], "-np/--parallel: expected a whole number from 0 to 256, not 'many'"),
        (["-m", "x", "--temp", "nan"], "--temp/--temperature: expected a number from 0 to 100, not 'nan'"),
        (["-m", "x", "-fa", "maybe"], "-fa/--flash-attn: expected one of auto, off, on, not 'maybe'"),
        (["-m", "x", "--ctx-sise", "9"], "unknown flag --ctx-sise; the nearest is --ctx-size"),
        (["-m", "x", "--paralel=9"], "unknown flag --paralel; the nearest is --parallel"),
        (["-m", "x", "--spec-draft-sampling"], "--spec-draft-sampling: expected one argument"),
        (
            ["-m", "x", "--spec-type", "suffix,ngram-mood"],
            "--spec-type: unknown value 'ngram-mood'; the nearest is ngram-mod",
        ),
        (
            ["-m", "x", "--spec-type", "draft-eagle3"],
            "--spec-type: draft-eagle3 needs inputs of the model's layers, which llama.cpp's C API does not return; "
            "use draft with -md, draft-mtp, or auto",
        ),
        (["-m", "x", "--foo"], "unknown flag --foo"),
        (
            ["-m", "x", "--kv-unified=maybe"],
            "--kv-unified takes no value: use --kv-unified or --no-kv-unified",
        ),
        (["-m", "x", "--jinja=maybe"], "--jinja takes no value: use --jinja"),
        (["-m", "x", "y"], "unexpected argument 'y'; a model is named with -m"),
        (["-m", "x", "--api-prefix", "/a/"], "--api-prefix: expected a text such as /llm, not '/a/'"),
        (["-m", "caf\udce9"], "-m/--model: expected a text in UTF-8, not 'caf\\udce9'"),
        (["-m", "x", "--api-key", "a,\udcff"], "--api-key: expected a text in UTF-8, not ['a,\\udcff']"),
        (["-m", "x", "--config", "/nowhere"], "--config: cannot read /nowhere: No such file or directory"),
    ],
)
def test_errors_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().err == f"paceline serve: {message}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots = 5", "unknown table [slots]"),
        ("[bach]\nslots = 5", "unknown table [bach]; the nearest is batch"),
        ("[batch]\nslotz = 5", "[batch] has no key 'slotz'; the nearest is slots"),
        ("[batch]\nslots = 257", "[batch] slots: expected a whole number from 0 to 256, not 257"),
        ('[batch]\nslots = "5"', "[batch] slots: expected a whole number from 0 to 256, not '5'"),
        ("[batch]\ncontext_shift = 1", "[batch] context_shift: expected true or false, not 1"),
        ("[server]\nhost = true", "[server] host: expected a list of at least 1 item, not true"),
        ("[server]\napi_keys = 7", "[server] api_keys: expected a list of at least 1 item, not 7"),
        ("[speculation]\nmap_k_size_n = 0", "map_k_size_n: expected a whole number from 1 to 1024, not 0"),
        ("[batch", "is not TOML"),
        ('[speculation]\ntypes = ["sufix"]', "[speculation] types: unknown value 'sufix'; the nearest is suffix"),
        ("[speculation]\ntypes = 7", "[speculation] types: expected some of auto, draft, "),
        ("[speculation]\ntypes = [1]", "[speculation] types: expected some of auto, draft, "),
        ("[sampling]\nlogit_bias = []", "[sampling] has no key 'logit_bias'"),
    ],
)
def test_errors_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "paceline.toml"
    file.write_text(text)
    with pytest.raises(OptionError) as caught:
        parse(["-m", "x", "--config", str(file)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_two_settings_share_a_name() -> None:
    names = [name for option in ALL_OPTIONS for name in option.names]
    assert len(names) == len(set(names))


def test_every_setting_has_a_description() -> None:
    assert [flag.dest for flag in FLAGS if not flag.help] == []


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for flag in FLAGS for name in (*flag.names, flag.env))
    unwrapped = "".join(shown.split())
    assert all(flag.allowed.replace(" ", "") in unwrapped for flag in FLAGS)
    assert "ngram-simplealone(from1to1024;default:as--spec-ngram-size-n)" in unwrapped


def test_every_field_has_a_spelling_and_every_spelling_a_field() -> None:
    structs = {field.type: set(field.type.__struct_fields__) for field in msgspec.structs.fields(Options)}
    structs[SamplingParams] -= {"logit_bias", "samplers", "min_keep"}  # GenerationConfig sets the first two
    assert {struct: set(spellings) for struct, spellings in SPELLINGS.items()} == structs
    assert tuple(HEADINGS) == Options.__struct_fields__


def test_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags"]) == 0
    reference = capsys.readouterr().out
    assert reference == flag_reference()
    assert (
        "| `-np`, `--parallel`, `$LLAMA_ARG_N_PARALLEL` | `slots` | 0 | "
        "number of slots: sequences that are decoded together; 0 is 16, " in reference
    )
    settings, _ = reference.split("## Flags without effect")
    rows = [line for line in settings.split("\n") if line.startswith("| `")]
    assert len(rows) == len(FLAGS)
    assert BatchConfig().num_slots == 16


def test_the_reference_file_is_current() -> None:
    assert (ROOT / "api" / "FLAGS.md").read_text() == flag_reference(), "python -m api flags > api/FLAGS.md"


def test_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["--help"]) == 0
    assert main(["sirve"]) == 2
    assert main(["--version"]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"paceline: unknown command 'sirve'; the nearest is serve\n{USAGE}\n"
    assert shown.out.startswith(USAGE)
    assert shown.out.split("\n")[-2].startswith("paceline 0.")
