"""Tool calling: the calls that a request allows, and the formats in which models write calls and reasoning."""
