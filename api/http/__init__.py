"""HTTP without knowledge of endpoints: middleware, request bodies, error responses, JSON and event-stream responses."""
