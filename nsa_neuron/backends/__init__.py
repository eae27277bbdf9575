"""Backends: support checks, layouts, tile plans and launches of each machine."""
