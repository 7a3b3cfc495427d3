"""Data of the tests of bounds."""

import torch

X = torch.tensor([0.3, -1.9, 2.4, -0.2], dtype=torch.float64)
