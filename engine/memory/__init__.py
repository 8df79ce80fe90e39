"""Who holds which cells: the radix tree of resident prefixes, and leases on sequences."""

from engine.memory.cells import Cells, Lease
from engine.memory.ordered import Ordered
from engine.memory.radix import Match, RadixTree

__all__ = ["Cells", "Lease", "Match", "Ordered", "RadixTree"]
