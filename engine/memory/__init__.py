"""Who holds which cells: the radix tree of resident prefixes, and leases on sequences."""

from engine.memory.cells import Cells
from engine.memory.lease import Lease
from engine.memory.ordered import Ordered
from engine.memory.radix import Match, RadixTree
from engine.memory.store import Store, open_store

__all__ = ["Cells", "Lease", "Match", "Ordered", "RadixTree", "Store", "open_store"]
