"""The evidence and expectations, by importance sampling."""
