"""Several processes: what they tell each other, and their random numbers."""
