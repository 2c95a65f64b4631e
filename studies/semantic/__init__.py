"""What is a topic's bundle worth to its own topic, to the others, and to text of no topic?

The experiment is recipes/semantic.py.
"""
