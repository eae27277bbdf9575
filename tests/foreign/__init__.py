"""AWS's own kernels, unmodified, from checkouts of their repositories."""
