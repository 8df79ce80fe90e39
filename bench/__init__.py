"""Measurements of Paceline. Most modules are commands: `python -m bench.NAME --help`."""
