"""Public implementations of NSA and dense attention in one benchmark: `python -m tools.peers`."""
