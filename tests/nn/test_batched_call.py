"""Many draws give the outputs of the draws one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pyro_ext.nn import BayesianModule
from tests.nn.networks import NETS, NORMAL, draw, leaves, run


@pytest.mark.parametrize("leading", [(4,), (4, 1), (4, 1, 1), (2, 3, 1)])
@pytest.mark.parametrize("name", NETS)
def test_many_draws_are_the_draws_one_by_one(name, leading):
    make, shape, is_vectorized = NETS[name]
    net = make()
    module = BayesianModule(net, NORMAL)
    x = torch.randn(shape)
    values = draw(module, leading)
    kept = [size for size in leading if size > 1]
    flat = {n: v.reshape(-1, *module.value_of(n).shape) for n, v in values.items()}
    num_draws = len(next(iter(flat.values())))

    state = torch.get_rng_state()
    output = leaves(run(module, values, x))
    again = leaves(run(module, values, x))
    assert torch.equal(state, torch.get_rng_state())
    if is_vectorized is not None:
        assert list(module._call._is_looped.values()) == [not is_vectorized]
    torch.testing.assert_close(output, again, rtol=0, atol=0)
    single = [
        leaves(functional_call(copy.deepcopy(net), {n: v[i] for n, v in flat.items()}, (x,)))
        for i in range(num_draws)
    ]
    for position, found in enumerate(output):
        expected = torch.stack([each[position] for each in single])
        expected = expected.reshape(*kept, *expected.shape[1:])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_draws_that_differ_in_leading_dims_broadcast():
    module = BayesianModule(nn.Linear(3, 2), NORMAL)
    x = torch.randn(5, 3)
    weight, bias = torch.randn(4, 1, 2, 3), torch.randn(2)
    output = run(module, {"weight": weight, "bias": bias}, x)
    torch.testing.assert_close(output, x @ weight.squeeze(1).mT + bias)


def test_gradients_of_many_draws():
    for name in ("mlp", "lstm"):
        make, shape, _ = NETS[name]
        module = BayesianModule(make(), NORMAL)
        x = torch.randn(shape)
        values = {n: v.requires_grad_() for n, v in draw(module, (3, 1)).items()}
        together = torch.autograd.grad(run(module, values, x).square().sum(), [*values.values()])
        apart = [
            torch.autograd.grad(
                run(module, {n: v[i, 0] for n, v in values.items()}, x).square().sum(),
                [*values.values()],
            )
            for i in range(3)
        ]
        torch.testing.assert_close(
            list(together), [sum(g) for g in zip(*apart, strict=True)], rtol=1e-4, atol=1e-5
        )


def test_running_statistics_see_every_draw():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module = BayesianModule(net, NORMAL)
    x = torch.randn(6, 3)
    values = draw(module, (5, 1))
    run(module, values, x)
    for i in range(5):
        functional_call(net, {n: v[i, 0] for n, v in values.items()}, (x,))
    statistics = dict(module.net.named_buffers())
    for name, expected in net.named_buffers():
        torch.testing.assert_close(statistics[name], expected)
    module.eval()
    assert run(module, values, x).shape == (5, 6, 4)
    assert list(module._call._is_looped.values()) == [True, False]


def test_dropout_differs_between_draws():
    module = BayesianModule(nn.Sequential(nn.Linear(3, 40), nn.Dropout()), NORMAL)
    values = {"0.weight": torch.ones(2, 1, 40, 3), "0.bias": torch.ones(2, 1, 40)}
    first, second = run(module, values, torch.ones(1, 3))
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(*run(module, values, torch.ones(1, 3)))


def test_an_error_of_the_module_is_its_own_and_changes_nothing():
    module = BayesianModule(nn.Linear(3, 2), NORMAL)
    values = draw(module, (4, 1))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(module, values, torch.randn(5, 7))
    assert run(module, values, torch.randn(5, 3)).shape == (4, 5, 2)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(module, values, torch.randn(5, 7))
    assert list(module._call._is_looped.values()) == [False]


class Clipped(nn.Module):
    """Outputs that are no tensors, and a branch on values, which vmap does not take."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x, clip=False):
        y = self.linear(x)
        if clip and y.max() > 0.1:
            y = y.clamp(max=0.1)
        return (y, None, 3) if clip else y


def test_branches_and_other_outputs_are_looped():
    module = BayesianModule(Clipped(), NORMAL)
    x = torch.randn(5, 3)
    values = draw(module, (4, 1))
    plain = run(module, values, x)
    clipped, nothing, number = run(module, values, x, clip=True)
    torch.testing.assert_close(clipped, plain.clamp(max=0.1))
    assert (nothing, number) == (None, 3)
    assert list(module._call._is_looped.values()) == [False, True]
