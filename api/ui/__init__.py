"""The page at `/` and the events of its live view.

page      serves the files in `static/`: a page, its style and its ES modules, with a strict Content-Security-Policy
snapshot  the state of the server at a moment, from the engine's statistics and slots
events    GET /v1/paceline/events: a snapshot a second, computed once for all viewers
"""
