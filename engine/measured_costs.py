"""Costs of the steps of a model with one configuration on this machine, loaded from a file or measured."""

from __future__ import annotations

from engine.adapters import default_set
from engine.backend import Backend
from engine.config import EngineConfig, processor_name
from engine.pace import Calibration, Layout, calibrate, load_calibration, save_calibration


def load_or_measure_costs(config: EngineConfig, backend: Backend, *, remeasure: bool = False) -> Calibration:
    """Returns the measured costs of the steps of `backend`, which was opened with `config`.

    Costs that an earlier start saved are reused. Without saved costs, and with `remeasure`, the costs are measured now
    and saved.
    """
    model, info = config.model, backend.info
    settings = f"{model.threads} {model.threads_batch} {config.batch.ubatch} {backend.context.outputs}"
    settings += f" {model.gpu_layers} {model.device} {model.split_mode} {model.tensor_split} {model.main_gpu}"
    settings += f" {model.kv_offload} {model.op_offload} {config.load} {config.cpu}"
    settings += f" {default_set(info.adapters)}" if info.adapters else ""
    layout = Layout.of(backend.context)
    key = f"{info.layout} {info.device} {settings} {layout} {backend.context.sequences} {processor_name()}"
    measured = None if remeasure else load_calibration(key)
    if measured is None:
        save_calibration(key, measured := calibrate(backend.context))
    return measured
