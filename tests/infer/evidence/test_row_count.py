"""The batches of a loader must hold each row of the plate once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader

from pyro_ext.infer import EvidenceState, estimate_evidence

X = torch.linspace(-2, 2, 10)
FEW = {"num_samples": 4}


def model(x):
    with pyro.plate("data", 10, subsample=x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_length(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_rows_that_are_left_out_are_warned_of():
    loader = DataLoader(X, batch_size=4, drop_last=True)
    with pytest.warns(
        UserWarning, match=r"covers 8 rows, .* plate 'data' is 10\..* num_rows=8"
    ) as w:
        found = estimate_evidence(model, data_loader=loader, **FEW)
    assert w[0].filename == __file__
    assert found.log_evidence.shape == (8,)
    found = estimate_evidence(model, data_loader=loader, num_rows=8, **FEW)
    assert found.log_evidence.shape == (8,)
    with pytest.raises(ValueError, match=r"have 8 rows, but num_rows is 10\..*drop_last=False"):
        estimate_evidence(model, data_loader=loader, num_rows=10, **FEW)


def test_rows_that_come_twice_are_refused_at_once():
    batches = [*X.split(4), X[:4], None]
    with pytest.raises(ValueError, match=r"first 4 batches .* 14 rows, .* plate 'data' is 10\."):
        estimate_evidence(model, data_loader=batches, **FEW)
    with pytest.raises(ValueError, match=r"first 2 batches .* 8 rows, but num_rows is 6\."):
        estimate_evidence(of_length, data_loader=batches, num_rows=6, **FEW)


def test_a_plate_without_a_size_of_its_own_takes_any_rows():
    assert estimate_evidence(of_length, data_loader=X.split(4), **FEW).log_evidence.shape == (10,)
    batches = [*X.split(4), X[:3]]
    assert estimate_evidence(of_length, data_loader=batches, **FEW).log_evidence.shape == (13,)
    found = estimate_evidence(of_length, data_loader=batches, num_rows=13, **FEW)
    assert found.log_evidence.shape == (13,)


def test_more_held_out_rows_than_those_of_training_need_their_number():
    held_out = torch.cat([X, X + 1]).split(4)
    with pytest.raises(ValueError, match="pass their number as num_rows="):
        estimate_evidence(model, data_loader=held_out, **FEW)
    found = estimate_evidence(model, data_loader=held_out, num_rows=20, **FEW)
    assert found.log_evidence.shape == (20,)


def test_blocks_with_draws_count_too():
    state, batches = EvidenceState(), [*X.split(4)]
    estimate_evidence(model, data_loader=batches, state=state, **FEW)
    with pytest.warns(UserWarning, match="covers 8 rows"):
        estimate_evidence(model, data_loader=batches[:2], state=state, **FEW)
    with pytest.raises(ValueError, match="14 rows"):
        estimate_evidence(model, data_loader=[*batches, X[:4]], state=state, **FEW)


@pytest.mark.parametrize("position", [0, 1])
def test_the_plate_of_the_rows_is_the_one_that_counts(position):
    names = ("data", "other")

    def two_plates(x):
        sizes = {names[position]: 10, names[1 - position]: 3}
        with (
            pyro.plate(names[position], 10, subsample_size=x.shape[0], dim=-2),
            pyro.plate(names[1 - position], sizes[names[1 - position]], dim=-1),
        ):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    batches = torch.randn(10, 3).split(4)
    options = {"data_plate": names[position], **FEW}
    assert estimate_evidence(two_plates, data_loader=batches, **options).plates == (
        names[position],
        names[1 - position],
    )
    with pytest.warns(UserWarning, match=f"covers 8 rows, .* plate '{names[position]}' is 10"):
        estimate_evidence(two_plates, data_loader=batches[:2], **options)
