"""Can text, preferences and RL be learnt in one job, and each be switched off afterwards?

The experiment is recipes/rl_separate.py.
"""
