"""The simulated backend and its proposers."""

from __future__ import annotations

from collections.abc import Callable

from engine.backend import LoadProgress, ModelInfo
from engine.config import EngineConfig
from engine.contract import Request
from engine.sim.context import SimContext
from engine.sim.costs import read_cost
from engine.sim.proposer import SimProposer
from engine.sim.vocab import END_TOKEN, SimVocab
from engine.speculate import Proposer, ProposerFactory

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class SimBackend:
    """Implements `engine.backend.Backend`."""

    def __init__(self, config: EngineConfig, context: SimContext) -> None:
        self.vocab = SimVocab(config.sim.vocabulary)
        self.context = context
        sim = config.sim
        self.info = ModelInfo(
            name=config.model.path,
            path=config.model.path,
            description="a simulated model",
            bytes=0,
            parameters=0,
            vocabulary=self.vocab.size,
            trained_context=0,
            context=context.cells,
            device=f"simulated, a step's cost {sim.cost}",
            chat_template=_CHAT_TEMPLATE,
            bos="",
            eos=self.vocab.text(END_TOKEN),
            bos_added=False,
            digest=f"{sim.seed}",
            build="simulated",
            layout=f"simulated {sim.seed} {sim.cost}",
        )

    def close(self) -> None:
        """Does nothing, as the backend has no native objects."""


def open_sim(config: EngineConfig, progress: LoadProgress, keep_loading: Callable[[], bool]) -> SimBackend:
    """Returns the simulated backend. `keep_loading` is not called. Raises ModelError if `config.sim.cost` is neither
    the name of a cost nor a cost file."""
    context = SimContext(config, read_cost(config.sim.cost))
    progress(1.0)
    return SimBackend(config, context)


def sim_proposers(config: EngineConfig) -> ProposerFactory | None:
    """Returns the factory of simulated proposers; None if the usual proposers are used."""
    if not (config.sim.on and config.sim.accept):
        return None

    def proposers_of(request: Request) -> dict[str, Proposer]:
        if request.speculation is not None and not request.speculation.type:
            return {}
        return {"simulated": SimProposer(config.sim.seed, config.sim.accept)}

    return proposers_of
