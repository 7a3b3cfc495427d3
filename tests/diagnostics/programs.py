"""Data, and a model and guide as a pair."""

import torch

X = torch.tensor([0.3, -1.9, 2.4, -0.2, 1.0], dtype=torch.float64)


def pair(programs):
    return programs.model, programs.guide
