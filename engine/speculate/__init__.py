"""Speculative decoding: proposers draft the next tokens of each sequence, and the model verifies drafts in one step.

proposer              the protocols of proposers, and their drafts
ngram_simple, ngram_map, ngram_mod, ngram_cache, suffix, prediction, grammar, draft_model, mtp    one type each
sampled_draft         history and draft of one sequence of draft_model or mtp
ngram_index, ngram_counts, suffix_tree    data structures of the proposers
vocabulary            comparison of vocabularies, for draft models and for files of token ids
shared_data           data that the proposers of all requests share, and the files of that data
proposer_stats        counts, times and acceptance of one type of proposer, and its lines in the log
tracked_proposer      a proposer of one sequence with its draft and its statistics
sequence_proposers    all proposers of one sequence
planner               the drafts that one step verifies, for all sequences
speculative_decoding  proposers, shared data, statistics and planner of one engine
lookup                builds the static file of ngram_cache
"""

from engine.speculate.draft_model import DraftModel
from engine.speculate.mtp import MtpProposer
from engine.speculate.planner import DraftCandidate, LastStep
from engine.speculate.proposer import NO_DRAFT, Draft, DraftBounds, Proposer, num_matching
from engine.speculate.sequence_proposers import FEED_TOKENS, SequenceProposers
from engine.speculate.shared_data import SharedDraftData, check_draft_files
from engine.speculate.speculative_decoding import ProposerFactory, SpeculativeDecoding
from engine.speculate.vocabulary import vocabulary_mismatch

__all__ = [
    "FEED_TOKENS",
    "NO_DRAFT",
    "Draft",
    "DraftBounds",
    "DraftCandidate",
    "DraftModel",
    "LastStep",
    "MtpProposer",
    "Proposer",
    "ProposerFactory",
    "SequenceProposers",
    "SharedDraftData",
    "SpeculativeDecoding",
    "check_draft_files",
    "num_matching",
    "vocabulary_mismatch",
]
