"""Simulation: a backend whose model computes nothing, for load tests without weights.

The simulated model emits words drawn from a hash of all tokens before, so equal histories have equal outputs. A step
takes the time of a cost curve. A proposer with a set acceptance may replace all others.
"""

from engine.sim.backend import open_sim, sim_proposers

__all__ = ["open_sim", "sim_proposers"]
