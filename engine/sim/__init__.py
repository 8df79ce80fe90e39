"""Simulation: a backend that computes no model, for load tests without weights.

The simulated model draws each word from a hash of all earlier tokens, so equal histories have equal outputs. A step
takes the time that a cost curve gives. A simulated proposer with a given acceptance can replace all other proposers.

backend   the simulated model and its proposers
context   its KV cells and decodes
vocab     its vocabulary
hashing   hashes of histories, from which it draws its output
costs     costs of its steps: named, or measured by `paceline cost`
proposer  a proposer with a given acceptance
"""

from engine.sim.backend import open_sim, sim_proposers

__all__ = ["open_sim", "sim_proposers"]
