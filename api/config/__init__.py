"""Options of `paceline serve`: Structs, flags, and the parser of command line, environment and configuration file."""
