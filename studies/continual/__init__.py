"""Does separation reduce interference? Three tasks learnt together or in turn, by every method at one budget.

The experiment is recipes/continual.py.
"""
