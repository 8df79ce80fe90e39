"""The KV cache: which tokens are in which cells, in RAM and on disk, and which sequence uses them.

cache          the façade, `KVCache`; besides it only its arguments and results are used from outside
allocation     these values: a prompt's match, an allocation, blocks to load
tree           prefix tree: which sequence id of the context holds which tokens
residents      the ids: allocated, idle or free; context and tree change together
idle           LRU order, and the ski-rental rule for keeping
allocator      the id for a prompt; placement is its policy for per-slot KV
eviction       saves and drops idle sequences
offloader      moves blocks between context and tiers
offload        the tiers: states in RAM and on disk; block_tree, block, tier, disk are its parts
reuse          parts of a prompt computed at other positions
transfer       slots saved to and restored from files; sequence_file is such a file, record the format of both files
"""

from engine.kv.allocation import Allocation, KVStats, Match
from engine.kv.cache import KVCache
from engine.kv.offload import Offload, open_offload
from engine.kv.placement import Costs
from engine.kv.tree import PrefixTree

__all__ = ["Allocation", "Costs", "KVCache", "KVStats", "Match", "Offload", "PrefixTree", "open_offload"]
