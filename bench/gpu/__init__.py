"""What Paceline costs and gains, measured. Each module is a command: `python -m bench.NAME --help`."""
