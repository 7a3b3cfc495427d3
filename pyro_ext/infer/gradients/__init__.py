"""Estimators of the gradient of a bound, and their signal-to-noise ratio."""
