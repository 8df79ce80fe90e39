"""Continuous batching over llama.cpp for asyncio: the public names, nothing else."""
