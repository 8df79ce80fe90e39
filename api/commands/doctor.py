"""`paceline doctor`: reports on the machine and a model, in lines for a bug report."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import msgspec
from msgspec import Struct

from api.config.command_line import OptionError, parse
from api.config.options import Options
from api.generation.loaded_model import PACELINE_VERSION
from api.hub.errors import HubError
from api.hub.resolve import resolve_models
from api.server.terminal import ProgressBar, print_line
from api.templates.builtin import CHATML
from api.templates.chat_template import Capabilities, ChatTemplate, InvalidTemplate, configured_template
from api.tools.formats import format_of
from engine import Diagnosis, MachineInfo, OpenedEngine, StepEstimate, diagnose

_USAGE = """\
usage: paceline doctor -m model.gguf [--json] [flags of paceline serve]

Opens the model as the server would, and once more with --deterministic, and prints what the machine and the model
allow. Measures the costs of steps unless an earlier start has, or --no-calibrate is given. Exit code 1 means that the
model cannot be served.
"""
_LABEL_CHARS = 14
# Names among the library's CPU features other than instruction sets.
_BUILD_OPTIONS = ("LLAMAFILE", "OPENMP", "REPACK", "ACCELERATE", "KLEIDIAI")
_GIB = 2**30


class TemplateReport(Struct, frozen=True):
    """The chat template and the format of tool calls."""

    source: str
    """`model`, `flag`, or `chatml` if there is no other."""
    problem: str
    """Why the template cannot be used; empty if it can."""
    tools_format: str
    capabilities: Capabilities | None
    """None if the template cannot be used."""


class DoctorReport(Struct, frozen=True):
    """The output of `paceline doctor --json`."""

    paceline: str
    llama_cpp_python: str
    system: str
    python: str
    diagnosis: Diagnosis
    template: TemplateReport | None
    """None if the model cannot be opened or generates no text."""
    default_proposers: tuple[str, ...]
    """Proposer types of requests without `speculative`."""


def run_doctor(arguments: Sequence[str]) -> int:
    """Prints the report and returns the exit code: 1 if the model cannot be served, 2 for invalid arguments."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(_USAGE)
        return 0
    try:
        options = parse([word for word in arguments if word != "--json"], os.environ)
        configured_template(options.chat)
    except (OptionError, InvalidTemplate) as error:
        print_line(f"paceline doctor: {error}")
        return 2
    try:
        options = resolve_models(options, print_line)
    except HubError as error:
        print_line(f"paceline: {error}")
        return 1
    with ProgressBar(f"Examining {Path(options.model.path).name}") as bar:
        report = doctor_report(options, diagnose(options.engine, bar.update))
    text = msgspec.json.format(msgspec.json.encode(report)).decode() if "--json" in arguments else report_text(report)
    sys.stdout.write(text + "\n")
    return 1 if report.diagnosis.served.engine is None else 0


def doctor_report(options: Options, diagnosis: Diagnosis) -> DoctorReport:
    """Returns the report of a diagnosis that was made with `options`."""
    engine, configured = diagnosis.served.engine, options.speculation.default_types
    generates = engine is not None and engine.info.generates
    proposers = engine.proposers if engine is not None and generates else ()
    return DoctorReport(
        PACELINE_VERSION,
        version("llama-cpp-python"),
        f"{platform.system()} {platform.release()} {platform.machine()}",
        platform.python_version(),
        diagnosis,
        _template_report(options, engine.info.chat_template) if engine is not None and generates else None,
        tuple(kind for kind in proposers if kind in configured or "auto" in configured),
    )


def _template_report(options: Options, own: str | None) -> TemplateReport:
    """Returns the report on the configured template, or else on `own`, the model's, or else on ChatML."""
    configured = configured_template(options.chat)
    kind = "flag" if configured else "model" if own else "chatml"
    source = configured or own or CHATML
    try:
        template = ChatTemplate(source)
    except InvalidTemplate as error:
        return TemplateReport(kind, str(error), "", None)
    problem = "" if template.accepts_text or template.accepts_parts else "it does not show the content of a message"
    return TemplateReport(kind, problem, format_of(source).name, template.capabilities)


# ── text ──


def report_text(report: DoctorReport) -> str:
    """Returns the report as lines of a label and a sentence."""
    machine, served = report.diagnosis.machine, report.diagnosis.served
    lines = {
        "versions": f"paceline {report.paceline}, llama-cpp-python {report.llama_cpp_python}, Python {report.python}, "
        f"{report.system}",
        **(_machine_lines(machine) if machine is not None else {}),
    }
    if served.engine is None:
        lines["model"] = f"cannot be served: {served.problem}"
    else:
        free = machine.free_bytes if machine is not None else 0
        lines |= _model_lines(served.engine, free)
        if report.template is not None:
            lines["chat template"] = _template_line(report.template)
            lines["speculation"] = _speculation_line(report, served.engine)
            lines["speed"] = _speed_line(served.engine)
            lines["deterministic"] = _deterministic_line(report.diagnosis)
    return "\n".join(f"{label:{_LABEL_CHARS}} {text}" for label, text in lines.items())


def _machine_lines(machine: MachineInfo) -> dict[str, str]:
    features = [name for name, on in re.findall(r"(\w+) = (\d+)", machine.build) if on == "1"]
    sets = " ".join(name for name in features if name not in _BUILD_OPTIONS) or "none listed"
    build = " ".join(machine.build.split()[:3])
    devices = ", ".join(
        f"{each.name} {each.description} ({each.free_bytes / _GIB:.1f} of {each.total_bytes / _GIB:.1f} GiB free)"
        for each in machine.devices
    )
    memory = f"{machine.free_bytes / _GIB:.1f} of {machine.memory_bytes / _GIB:.1f} GiB free"
    cores = f"{_count(machine.cores, 'core')}, {_count(machine.cpus, 'CPU')} usable"
    return {
        "machine": f"{machine.processor}, {cores}; memory: {memory}; devices besides the CPU: {devices or 'none'}",
        "library": f"{build}: {sets}",
    }


def _model_lines(engine: OpenedEngine, free_bytes: int) -> dict[str, str]:
    info = engine.info
    trained = f", trained for {info.trained_context} tokens" if info.trained_context else ""
    lines = {
        "model": f"{Path(info.path).name}: {info.description}, {info.bytes / _GIB:.2f} GiB, "
        f"{info.parameters / 1e6:.0f} M parameters{trained}; {info.device}",
    }
    if not info.generates:
        return {**lines, "use": "embeddings only"}
    layout = "unified" if engine.memory.kv_unified else "per slot"
    cells_size = f", {info.context * info.cell_bytes / _GIB:.2f} GiB" if info.cell_bytes else ""
    lines["KV cache"] = (
        f"{layout}, {_count(engine.slots, 'slot')}, {engine.request_limit} tokens for each request, "
        f"{info.context} cells{cells_size} ({engine.memory.kv_reason or 'the default'})"
    )
    limits = [] if engine.memory.partial else ["prefixes are shared as whole texts only"]
    limits += [f"sliding window of {engine.memory.window} tokens"] if engine.memory.window else []
    if info.cell_bytes and free_bytes and not info.offloaded:
        limits.append(f"about {max(0, free_bytes - info.bytes) // info.cell_bytes} cells (-c) fill the free memory")
    lines["context"] = "; ".join(limits) or "any length that fits the device"
    return lines


def _template_line(template: TemplateReport) -> str:
    source = {"model": "the model's own", "flag": "from the flags", "chatml": "none in the model, so ChatML"}
    if template.capabilities is None:
        return f"{source[template.source]}; cannot be used: {template.problem}"
    has = template.capabilities
    features = {
        "system role": has.supports_system_role,
        "tools": has.supports_tools,
        "parallel calls": has.supports_parallel_tool_calls,
        "reasoning effort": has.supports_reasoning_effort,
    }
    listed = ", ".join(name for name, on in features.items() if on) or "neither system role nor tools"
    problem = f"; {template.problem}" if template.problem else ""
    return f"{source[template.source]}, renders {listed}; format of tool calls: {template.tools_format}{problem}"


def _speculation_line(report: DoctorReport, engine: OpenedEngine) -> str:
    default = ", ".join(report.default_proposers) or "off"
    others = [kind for kind in engine.proposers if kind not in report.default_proposers]
    on_request = f"; on request {', '.join(others)}" if others else ""
    reasons: dict[str, list[str]] = {}
    for kind, reason in engine.unavailable_proposers.items():
        reasons.setdefault(reason, []).append(kind)
    missing = "".join(f"; not {', '.join(kinds)}: {reason}" for reason, kinds in reasons.items())
    return default + on_request + missing


def _speed_line(engine: OpenedEngine) -> str:
    estimates = [each for each in engine.steps if each.seconds]
    if not estimates:
        return "not measured (--no-calibrate, --no-warmup)"
    return "a step of " + ", ".join(
        f"{_streams(each)}: {1e3 * each.seconds:.1f} ms ({each.sequences / each.seconds:.0f} tokens/s)"
        for each in estimates
    )


def _deterministic_line(diagnosis: Diagnosis) -> str:
    served, exact = diagnosis.served.engine, diagnosis.exact
    if served is not None and served.info.exact:
        return "on"
    if exact is None:
        return "not tried"
    if exact.engine is None:
        return f"not possible: {exact.problem}"
    default = {(each.sequences, each.tokens): each.seconds for each in served.steps} if served is not None else {}
    ratios = [
        f"{each.seconds / usual:.2f} for {_streams(each)}"
        for each in exact.engine.steps
        if (usual := default.get((each.sequences, each.tokens)))
    ]
    return "possible with --deterministic" + (
        f"; its steps relative to those above: {', '.join(ratios)}" if ratios else ""
    )


def _streams(step: StepEstimate) -> str:
    return f"{step.sequences} × {step.tokens} tokens"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
