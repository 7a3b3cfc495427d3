"""Estimates of the evidence, and of expectations, by importance sampling."""
