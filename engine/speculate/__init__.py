"""Proposers: guesses at a request's next tokens, verified by the model in one step.

base        what a proposer is, and what a draft is
simple, map, mod, cache, suffix, prediction, forced, draft    one type each
ngrams, tree, files   what some of them are made of
vocabulary  whether a draft model fits
guesser     one type's proposer in one request, and how often it is right
drafter     the proposers of one request
proposals   one step's drafts for all requests: who is asked, what is verified
shared      what proposers share, and the files it is kept in
drafting    all of it for one engine
tally       counts, and the lines in the log
"""

from engine.speculate.base import NO_DRAFT, Bounds, Draft, Proposer
from engine.speculate.draft import DraftModel
from engine.speculate.drafter import LEARN, Drafter
from engine.speculate.drafting import Drafting, Speculate
from engine.speculate.proposals import Wish
from engine.speculate.shared import Shared
from engine.speculate.vocabulary import difference

__all__ = [
    "LEARN",
    "NO_DRAFT",
    "Bounds",
    "Draft",
    "DraftModel",
    "Drafter",
    "Drafting",
    "Proposer",
    "Shared",
    "Speculate",
    "Wish",
    "difference",
]
