"""The KV cache: which tokens are in which cells, in RAM and on disk, and which sequence uses them.

cache          the façade, `KVCache`
allocation     arguments and results of the façade: a prompt's match, an allocation, blocks to load
tree           prefix tree: the tokens that each sequence id of the context holds
residents      the state of each sequence id: allocated, idle or free
idle           idle sequences in LRU order, and the ski-rental rule for evicting them
allocator      allocates a sequence id to a prompt; placement is its policy for per-slot KV
eviction       saves and drops idle sequences
offloader      moves blocks between the context and the tiers
offload        the tiers: states in RAM and on disk; its parts are block_tree, block, tier and disk
reuse          finds parts of a prompt that were computed at other positions
changes        the blocks that enter or leave cells, RAM or disk, for routers
transfer       exports and imports sequences for slot files; sequence_file is such a file
record         the format of slot files and of the disk tier's files
"""

from engine.kv.allocation import Allocation, KVStats, Match
from engine.kv.cache import KVCache
from engine.kv.offload import Offload, open_offload
from engine.kv.placement import Costs
from engine.kv.tree import PrefixTree

__all__ = ["Allocation", "Costs", "KVCache", "KVStats", "Match", "Offload", "PrefixTree", "open_offload"]
