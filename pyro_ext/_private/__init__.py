"""The private names of torch and Pyro that this package uses; no other module touches one.

``tests/test_private.py`` fails with the name where a new version lacks one.
"""
