"""Routers: compute alphas and routing weights from the rows, instead of asking the caller."""
