"""Estimates of the evidence by annealed importance sampling."""
