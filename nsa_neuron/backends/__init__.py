"""Built-in backends; the registry imports each on first use."""
