"""Measures of answers, probabilities, code, text, forgetting and representations, each a function of its inputs."""
