"""How weights are combined: a file per family, small pure functions on tensors, one registry and one engine."""
