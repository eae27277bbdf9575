"""Launchers: one module per op; layout and padding are done here, once, with torch."""
