"""Bounds of the evidence: one class a file, each a function of K log weights."""
