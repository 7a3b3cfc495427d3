"""Weights of the KL term, by a schedule."""
