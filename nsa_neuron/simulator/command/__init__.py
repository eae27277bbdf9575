"""What a command line or a test suite asks for: simulate, lint, profile, bench."""
