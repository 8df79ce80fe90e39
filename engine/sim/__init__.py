"""A model that computes nothing: for load tests without weights, and to see what the engine itself costs.

It says words at random, yet always the same ones after the same text: what follows depends on a hash of all tokens
before. A speculator that knows them, and errs with a set chance, stands for all others. A step takes as long as a curve
says.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.backend import ModelInfo, Progress
from engine.config import EngineConfig
from engine.contract import Request
from engine.sim.context import SimContext, cost_of
from engine.sim.speculator import SimSpeculator
from engine.sim.words import END, SIZE, SimVocab
from engine.speculate import Speculate, Speculator

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class SimBackend:
    """Implements `engine.backend.Backend`."""

    def __init__(self, config: EngineConfig, context: SimContext) -> None:
        self.vocab = SimVocab()
        self.context = context
        sim = config.sim
        self.info = ModelInfo(
            name=config.model.path,
            path=config.model.path,
            description="a model that computes nothing",
            bytes=0,
            parameters=0,
            vocabulary=SIZE,
            trained_context=0,
            context=context.cells,
            device=f"simulated, a step's cost {sim.cost}",
            chat_template=TEMPLATE,
            bos="",
            eos=self.vocab.text(END),
            bos_added=False,
            digest=f"{sim.seed}",
            build="simulated",
            layout=f"simulated {sim.seed} {sim.cost}",
        )

    def close(self) -> None:
        """Nothing is held."""


def open_sim(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> SimBackend:
    """The model that computes nothing. Raises ModelError if `config.sim.cost` makes no sense."""
    context = SimContext(config, cost_of(config.sim.cost))
    progress(1.0)
    return SimBackend(config, context)


def speculators(config: EngineConfig) -> Speculate | None:
    """Who guesses for a model that computes nothing: the usual ones if nobody is to know what it says."""
    if not (config.sim.on and config.sim.accept):
        return None

    def speculate(request: Request) -> dict[str, Speculator]:
        if request.speculation is not None and not request.speculation.type:
            return {}
        return {"simulated": SimSpeculator(config.sim.seed, config.sim.accept)}

    return speculate
