"""Other libraries' models with NSA in them."""
