"""The KV cache: which tokens are in which cells, in RAM and on disk, and which sequence uses them.

cache          the façade, `KVCache`; nothing else here is used from outside, the values it takes and gives excepted
allocation     those values: a prompt's match, an allocation, blocks to load
tree           prefix tree: which sequence id of the context holds which tokens
residents      the ids: allocated, idle or free; context and tree change together
idle           LRU order, and the ski-rental rule for keeping
allocator      which id takes a prompt; placement is its policy for per-slot KV
eviction       what leaves the context, saved before
offloader      moves blocks between context and tiers
offload        the tiers: blocks in RAM and on disk; tier, block, disk are its parts
reuse          parts of a prompt computed at other positions
transfer       slots saved to and restored from files; sequence_file is such a file, record the format of both files
"""

from engine.kv.allocation import Allocation, KVStats, Match
from engine.kv.cache import KVCache
from engine.kv.offload import Offload, open_offload
from engine.kv.placement import Costs
from engine.kv.tree import PrefixTree

__all__ = ["Allocation", "Costs", "KVCache", "KVStats", "Match", "Offload", "PrefixTree", "open_offload"]
