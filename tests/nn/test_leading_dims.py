import pytest
import torch
from torch import nn

from pyro_ext.nn import LeadingDims


@pytest.mark.parametrize("leading", [(), (4,), (3, 4), (2, 1, 4)], ids=str)
def test_equals_the_module_on_each_entry(leading):
    convolution = nn.Conv2d(2, 3, 3)
    x = torch.randn(*leading, 2, 8, 8)
    found = LeadingDims(convolution, event_dim=3)(x)
    assert found.shape == (*leading, 3, 6, 6)
    expected = torch.stack([convolution(image) for image in x.reshape(-1, 2, 8, 8)])
    torch.testing.assert_close(found.reshape(-1, 3, 6, 6), expected, rtol=1e-5, atol=1e-6)


def test_inputs_broadcast_and_structured_outputs_are_restored():
    class TwoHeads(nn.Module):
        def forward(self, a, b):
            return a + b, (a * b).sum(-1)

    both, product = LeadingDims(TwoHeads(), event_dim=1)(torch.ones(5, 1, 3), torch.ones(4, 3))
    assert both.shape == (5, 4, 3)
    assert product.shape == (5, 4)


def test_takes_part_in_a_state_dict():
    net = LeadingDims(nn.Linear(2, 3), event_dim=1)
    assert set(net.state_dict()) == {"module.weight", "module.bias"}
    assert "event_dim=1" in repr(net)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LeadingDims(nn.Bilinear(3, 3, 1), 1)(torch.ones(4, 2, 3), torch.ones(5, 3)),
            r"leading dims of the inputs do not broadcast: \[\(4, 2\), \(5,\)\]",
        ),
        (lambda: LeadingDims(nn.ReLU(), -1), "event_dim must be at least 0, but it is -1"),
        (
            lambda: LeadingDims(nn.ReLU(), 3)(torch.zeros(2, 2)),
            r"input 0 has shape \(2, 2\), .* fewer dims than event_dim=3",
        ),
        (
            lambda: LeadingDims(nn.Flatten(0), 1)(torch.zeros(5, 4, 3)),
            r"output of Flatten has shape \(60,\).* keep the batch of 20 as its first dim",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LeadingDims("net", 1), "module must be a torch.nn.Module, but it is 'net'"),
        (lambda: LeadingDims(nn.ReLU(), 1)(5), "input 0 must be a tensor, but it is 5"),
        (
            lambda: LeadingDims(nn.LSTM(3, 2, batch_first=True), 2)(torch.zeros(6, 4, 7, 3)),
            "the output of LSTM must be a tensor, .* but it is a tuple",
        ),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=message):
        call()
