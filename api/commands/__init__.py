"""Commands other than `serve`: each module runs one and returns its exit code."""
