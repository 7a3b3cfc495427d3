"""The shapes in annotations are checked while the tests run."""

from dataclasses import replace

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from pyro_ext.infer import ImportanceWeightedELBO
from tests.models import NormalNormal
from tests.shapes import check

LOG_W = torch.zeros(3, 5)


def test_other_annotations_are_left_alone():
    @check
    def mean(x: Float[Tensor, "K *common"], number: int) -> Float[Tensor, "*common"]:
        return x.mean(0)

    assert mean(LOG_W, "not checked").shape == (5,)
    with pytest.raises(BeartypeCallHintViolation):
        mean("no tensor", 1)


def test_a_number_has_no_shape():
    with pytest.raises(TypeCheckError, match="log_w"):
        ImportanceWeightedELBO().bound(torch.tensor(1.0))


def test_fields_have_the_same_common_plates():
    programs = NormalNormal(LOG_W[0])
    particles = ImportanceWeightedELBO(3).trace_particles(programs.model, programs.guide)
    assert particles.log_w.shape == (3, 5)
    with pytest.raises(TypeCheckError, match="log_q"):
        replace(particles, log_q=LOG_W[:, :4])
