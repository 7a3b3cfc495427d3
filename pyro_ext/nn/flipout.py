import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ext.nn.per_example_noise import Layer, NoisePerExample


class flipout(NoisePerExample):
    r"""A context manager that flips the signs of the weights' noise at random for each example.

    .. math:: W_n = \mu + (W - \mu) \circ r_n s_n^\top, \qquad r_n, s_n \in \{-1, 1\}

    Use it around SVI steps or evaluations of a model with a :class:`BayesianModule`. It applies to
    linear layers and to convolutions of all kinds. All positions of an example may share the
    weights. Other layers use the drawn weights.

    Under a guide of independent normals, each example's weights have the distribution of W. They
    are uncorrelated with the weights of other examples. The gradient of the ELBO therefore has the
    same mean as without flipout, and a lower variance.

    The examples must be along the first dim of the module's first input and of the layers' inputs.
    The loss must be a sum over examples. Each term must depend only on its own example's part of
    the layers' outputs. Do not use flipout with nonlinear bounds. The multi-sample bounds of this
    package raise an error. Pyro's ``RenyiELBO`` with several particles in a loop cannot be
    detected, and gives wrong results.

    :raises ValueError: in a run: if there is more than one draw of the weights at a time; if the
        guide does not draw the weights from independent normals; if the first dim of a layer's
        input does not hold the examples; if the module has neither linear layers nor convolutions;
        or for multi-sample bounds with K > 1.

    Source: Wen, Vicol, Ba, Tran and Grosse (2018), Flipout: Efficient Pseudo-Independent Weight
    Perturbations on Mini-Batches.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, TraceMeanField_ELBO
    >>> from pyro_ext.nn import BayesianModule, MeanFieldGuide
    >>> net = BayesianModule(torch.nn.Conv1d(3, 1, 4), prior=dist.Normal(0.0, 1.0))
    >>> def model(x, y):
    ...     loc = net(x).mean((-1, -2))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(loc, 0.1), obs=y)
    >>> svi = SVI(model, MeanFieldGuide(net), pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    >>> with flipout():
    ...     loss = svi.step(torch.randn(5, 3, 9), torch.randn(5))
    """

    functions = (
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    )

    def output(self, layer: Layer) -> Tensor:
        """Return the output for the mean weights, plus the output for the noise with flipped signs.

        :param layer: one use of a layer.
        :returns: a tensor with the shape of the layer's output.
        """
        x, weight, bias = layer.input, layer.weight, layer.bias
        mean = layer.function(x, weight.loc, None if bias is None else bias.loc)
        # Features are the last dim of a linear layer, and the second dim of a convolution.
        dim = 1 if layer.is_convolution else -1
        output = mean
        if weight.scale is not None:
            flipped = x * _signs(layer.noise, "inputs", x, dim)
            perturbation = layer.function(flipped, weight.value - weight.loc, None)
            output = output + perturbation * _signs(layer.noise, "outputs", mean, dim)
        if bias is not None and bias.scale is not None:
            shape = [1] * mean.dim()
            shape[dim] = -1
            perturbation = (bias.value - bias.loc).reshape(shape)
            output = output + perturbation * _signs(layer.bias_noise, "outputs", mean, dim)
        return output


def _signs(noise: dict[str, Tensor], name: str, x: Tensor, dim: int) -> Tensor:
    """Return random signs for each example and feature, equal at all positions and in all uses."""
    if name not in noise:
        size = x.shape[0], x.shape[dim]
        signs = torch.randint(0, 2, size, device=x.device, dtype=x.dtype)
        noise[name] = signs.mul_(2).sub_(1)
    shape = [1] * x.dim()
    shape[0], shape[dim] = noise[name].shape
    return noise[name].reshape(shape)
