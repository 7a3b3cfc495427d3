"""How a step becomes a graph: what it reaches, what it does, and what compiles it."""
