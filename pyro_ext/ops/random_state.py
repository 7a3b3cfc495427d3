import torch
from torch import Tensor


def get_random_state() -> tuple[Tensor, list[Tensor]]:
    """The states of torch's generators, on the CPU and on every CUDA device in use."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), on_cuda


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    """Restores what :func:`get_random_state` returned."""
    on_cpu, on_cuda = state
    torch.set_rng_state(on_cpu)
    if on_cuda:
        torch.cuda.set_rng_state_all(on_cuda)
