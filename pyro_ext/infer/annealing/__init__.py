"""The evidence by annealed importance sampling."""
