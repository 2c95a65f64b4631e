"""What is left of a capability when its bundle is switched off, and how fast does it come back?

The experiment is recipes/removal.py.
"""
