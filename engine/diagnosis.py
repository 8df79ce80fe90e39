"""Examines a configuration on this machine, for `paceline doctor`.

The model is opened in a process of its own, because the native library ends the process at some faults, such as an
instruction that the processor lacks, and because the deterministic profile needs a process without other models.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from typing import Any

from msgspec import Struct, structs

from engine.backend import LoadProgress, ModelInfo
from engine.config import EngineConfig, physical_cores, processor_name
from engine.config.machine import memory_bytes
from engine.contract import EngineError, ProposerType
from engine.core_process import end_of_process
from engine.devices import DeviceInfo
from engine.engine import Engine
from engine.stats import MemoryInfo

# Numbers of sequences, and tokens of each, for which the cost of a step is reported, as far as slots and context allow.
_STEP_SEQUENCES, _STEP_TOKENS = (1, 8), (0, 2048)


class MachineInfo(Struct, frozen=True):
    """The machine, and the native library on it."""

    processor: str
    cores: int
    """Physical cores that the process may use."""
    cpus: int
    """Logical CPUs that the process may use."""
    memory_bytes: int
    free_bytes: int
    """Bytes that the process can still take without swapping."""
    devices: tuple[DeviceInfo, ...]
    """Devices besides the CPU."""
    build: str
    """Version, commit and CPU features of the native library."""


class StepEstimate(Struct, frozen=True):
    """Seconds of a decode of one row for each of `sequences` sequences, which have `tokens` tokens each, on a machine
    that computes nothing else."""

    sequences: int
    tokens: int
    seconds: float


class OpenedEngine(Struct, frozen=True):
    """Facts about an engine after its start."""

    info: ModelInfo
    memory: MemoryInfo
    slots: int
    request_limit: int
    """Maximum number of tokens of one request."""
    proposers: tuple[ProposerType, ...]
    unavailable_proposers: dict[str, str]
    """The reason for each type of proposer that no request can use."""
    steps: tuple[StepEstimate, ...]
    """Costs of steps. Empty if the configuration disables their measurement."""


class Opening(Struct, frozen=True):
    """The result of opening an engine."""

    engine: OpenedEngine | None
    problem: str = ""
    """Why the engine cannot be opened, in one line. Empty if it can."""


class Diagnosis(Struct, frozen=True):
    """The machine, and the engine with and without the deterministic profile."""

    machine: MachineInfo | None
    """None if the native library ended the process at its first call."""
    served: Opening
    exact: Opening | None
    """The engine with the deterministic profile. None if the profile was not tried: because the configuration has it or
    simulates its model, the engine without it cannot be opened, or the model generates no text."""


def diagnose(config: EngineConfig, progress: LoadProgress = lambda share: None) -> Diagnosis:
    """Opens `config` as a server would, and once more with the deterministic profile, each in a new process.

    Files that a running server may write are left alone: the disk tier and the files of the n-gram proposers.
    """
    speculation = structs.replace(config.speculation, pool_file="", lookup_dynamic="")
    memory, cpu = structs.replace(config.memory, disk=""), structs.replace(config.cpu, engine_process=False)
    config = structs.replace(config, memory=memory, cpu=cpu, speculation=speculation)
    machine, served = _in_new_process(config, progress)
    engine = served.engine
    if engine is None or not engine.info.generates or config.model.deterministic or config.sim.on:
        return Diagnosis(machine, served, None)
    config = structs.replace(config, model=structs.replace(config.model, deterministic=True))
    return Diagnosis(machine, served, _in_new_process(config, progress)[1])


def _in_new_process(config: EngineConfig, progress: LoadProgress) -> tuple[MachineInfo | None, Opening]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(config, sender), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of the messages
    machine: MachineInfo | None = None
    opening: Opening | None = None
    with receiver:
        for message in _messages(receiver):
            match message:
                case MachineInfo():
                    machine = message
                case Opening():
                    opening = message
                case share:
                    progress(share)
    process.join()
    return machine, opening or Opening(None, end_of_process(process.exitcode or 0))


def _messages(receiver: Connection) -> Any:
    while True:
        try:
            yield receiver.recv()
        except EOFError:
            return


# ── in the new process ──


def _report(config: EngineConfig, sender: Connection) -> None:
    """Sends a MachineInfo, loaded shares and an Opening."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sender.send(_machine())
    try:
        sender.send(Opening(asyncio.run(_open(config, sender.send))))
    except EngineError as error:
        sender.send(Opening(None, str(error)))


def _machine() -> MachineInfo:
    from engine.llama import library
    from engine.llama.layout import free_memory

    library.initialize()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = tuple(library.list_devices())
    name, memory = processor_name(), (memory_bytes(), free_memory())
    return MachineInfo(name, physical_cores(), cpus, *memory, devices, library.build_info())


async def _open(config: EngineConfig, progress: LoadProgress) -> OpenedEngine:
    async with Engine.open(config, progress=progress) as engine:
        steps: tuple[StepEstimate, ...] = ()
        if config.model.warmup and config.model.calibrate and engine.info.generates:
            counts = [count for count in _STEP_SEQUENCES if count <= engine.slots]
            sizes = sorted({min(tokens, engine.request_limit) for tokens in _STEP_TOKENS})
            wanted = [(count, tokens) for count in counts for tokens in sizes]
            steps = await engine.query(
                lambda core: tuple(
                    StepEstimate(count, tokens, core.cost.even_seconds(count, count * tokens) / core.cost.load_factor)
                    for count, tokens in wanted
                )
            )
        reasons = dict(engine.unavailable_proposers)
        facts = engine.info, engine.memory, engine.slots, engine.request_limit, engine.proposers
        return OpenedEngine(*facts, reasons, steps)
