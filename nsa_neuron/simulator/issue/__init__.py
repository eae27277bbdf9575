"""Issuing instructions: specs and their checks, the core, the record, cores and ranks."""
