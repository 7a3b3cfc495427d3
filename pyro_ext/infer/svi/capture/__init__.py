"""Captures a training step as a graph, checks the graph and compiles it."""
