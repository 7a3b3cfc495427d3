"""The private names of torch and Pyro that this package uses.

No other module uses a private name. If a new version of torch or Pyro lacks one,
``tests/test_private.py`` fails and prints its name.
"""
