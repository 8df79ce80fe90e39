"""Measurements on a GPU host without a network: an archive, a build, and models of random weights."""
