"""A folder for PYTHONPATH in which `import nki` finds the simulator; see docs/ci.md."""
