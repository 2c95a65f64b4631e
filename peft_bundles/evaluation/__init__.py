"""Measuring: answers, probabilities, code, text."""
