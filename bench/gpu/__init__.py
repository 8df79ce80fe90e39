"""Paceline on a GPU host without a network: packed and built, measured on models of random weights."""
