"""Tensors: layouts and views, what a record keeps of them, the bytes and what is written."""
