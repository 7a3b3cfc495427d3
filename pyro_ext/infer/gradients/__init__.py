"""How the gradient of a bound is estimated, and how well."""
