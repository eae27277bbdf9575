"""Programs for who works on the project, each `python -m tools.NAME` from its root."""
