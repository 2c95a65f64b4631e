"""Routers: alphas and routing weights computed from the rows, where the caller does not give them."""
