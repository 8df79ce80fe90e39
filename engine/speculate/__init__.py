"""Speculators: guesses at a request's next tokens, verified by the model in one step."""

from engine.speculate.base import Silent, Speculate, Speculator

__all__ = ["Silent", "Speculate", "Speculator"]
