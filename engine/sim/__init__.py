"""Load tests without weights: a backend in which everything is real but the model's computation.

The simulated model emits words that depend on a hash of all tokens before, so equal histories have equal outputs. A
proposer that knows the words and is wrong with a set chance takes the place of all others. A step takes as long as a
curve says.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.backend import ModelInfo, Progress
from engine.config import EngineConfig
from engine.contract import Request
from engine.sim.context import SimContext, cost_of
from engine.sim.proposer import SimProposer
from engine.sim.words import END, SIZE, SimVocab
from engine.speculate import Proposer, Speculate

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
            description="a simulated model",
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
        """Does nothing: no native object is held."""


def open_sim(config: EngineConfig, progress: Progress, go_on: Callable[[], bool]) -> SimBackend:
    """Returns the simulated backend. Raises ModelError if `config.sim.cost` names no cost."""
    context = SimContext(config, cost_of(config.sim.cost))
    progress(1.0)
    return SimBackend(config, context)


def proposers(config: EngineConfig) -> Speculate | None:
    """Returns the maker of simulated proposers; `None` if the usual proposers are to be used."""
    if not (config.sim.on and config.sim.accept):
        return None

    def speculate(request: Request) -> dict[str, Proposer]:
        if request.speculation is not None and not request.speculation.type:
            return {}
        return {"simulated": SimProposer(config.sim.seed, config.sim.accept)}

    return speculate
