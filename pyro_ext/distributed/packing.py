"""Gradients of many parameters as one vector."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None]


class Place(NamedTuple):
    """The shape and dtype of a parameter, whose gradient has a place in a vector."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> "Place":
        """Return the place for a tensor."""
        return Place(tuple(x.shape), x.dtype)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which gradients are added; at least float32."""
        is_wide = self.dtype in (torch.float64, torch.complex128)
        return torch.float64 if is_wide else torch.float32

    @property
    def size(self) -> int:
        """The number of real numbers."""
        return torch.Size(self.shape).numel() * (2 if self.dtype.is_complex else 1)


def buckets(places: Mapping[str, Place], num_bytes: float) -> Iterator[dict[str, Place]]:
    """Divide parameters among vectors, the last ones first, as a backward pass visits them.

    All parameters of a vector have the same dtype for sums. The last vector may be empty.

    :param places: the parameters by name.
    :param num_bytes: the number of bytes at which a vector is full.
    """
    dtypes = torch.float64, torch.float32
    if places and all(place.sum_dtype == torch.float64 for place in places.values()):
        dtypes = torch.float32, torch.float64
    for dtype in dtypes:
        bucket: dict[str, Place] = {}
        for name, place in [*places.items()][::-1]:
            if place.sum_dtype == dtype:
                bucket[name] = place
                if dtype.itemsize * sum(x.size for x in bucket.values()) >= num_bytes:
                    yield bucket
                    bucket = {}
        if bucket or dtype == dtypes[-1]:
            yield bucket


def packed(
    numbers: Sequence[float], weight: float, gradients: Gradients, places: Mapping[str, Place]
) -> Tensor:
    """Return numbers and weighted gradients as one vector, with zeros for gradients that are None.

    :param numbers: the numbers, which come first and are not weighted.
    :param weight: the weight of the gradients.
    :param gradients: the gradients by name.
    :param places: the parameters in the vector by name.
    """
    dtype = next((place.sum_dtype for place in places.values()), torch.float64)
    known: list[Any] = [gradients.get(name) if weight else None for name in places]
    device = next((x.device for x in known if x is not None), None)
    parts = [torch.tensor(numbers, dtype=dtype, device=device)]
    for x, place in zip(known, places.values(), strict=True):
        if x is None:
            parts.append(torch.zeros(place.size, dtype=dtype, device=device))
        else:
            dense = x if x.layout == torch.strided else x.to_dense()
            real = torch.view_as_real(dense.resolve_conj()) if x.is_complex() else dense
            parts.append(real.reshape(-1).to(dtype))
    vector = torch.cat(parts)
    vector[len(numbers) :] *= weight
    return vector


def unpacked(x: Tensor, gradients: Gradients, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Return the gradients in a vector by name, with the strides of those of this process."""
    found = {}
    parts = x.split([place.size for place in places.values()])
    for part, (name, place) in zip(parts, places.items(), strict=True):
        if place.dtype.is_complex:
            part = torch.view_as_complex(part.clone().view(-1, 2))  # aligned
        mean, like = part.view(place.shape).to(place.dtype), gradients.get(name)
        # Fused optimisers assume that a gradient has the strides of its parameter.
        is_strided = like is not None and like.layout == torch.strided
        if like is not None and is_strided and like.stride() != mean.stride():
            mean = torch.empty_like(like).copy_(mean)
        found[name] = mean
    return found
