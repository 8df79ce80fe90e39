"""The server process: the ASGI application with its routes, start and shutdown, Prometheus metrics, terminal output."""
