import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ext.nn.per_example_noise import Layer, NoisePerExample


class flipout(NoisePerExample):
    r"""Flips the signs of the weights' noise at random for each example.

    .. math:: W_n = \mu + (W - \mu) \circ r_n s_n^\top, \qquad r_n, s_n \in \{-1, 1\}

    Under a guide of independent normals each example's weights have the distribution of W, and are
    uncorrelated with those of other examples: the gradient of the ELBO has the same mean and less
    variance. It is for linear layers and convolutions of all kinds, also where positions of an
    example share the weights; other layers use the weights that were drawn. A context manager
    around steps of SVI or evaluations; the model has a :class:`BayesianModule`. Not for nonlinear
    bounds: Pyro's ``RenyiELBO`` with several particles in a loop cannot be told, and is wrong.

    Examples are along the first dim of the module's first input and of the layers' inputs. The
    loss must be a sum over examples, each of which depends on its own part of the layers alone.

    Source: Wen, Vicol, Ba, Tran and Grosse (2018), Flipout: Efficient Pseudo-Independent Weight
    Perturbations on Mini-Batches.

    :raises ValueError: when run: for more than one draw of the weights at a time; for weights that
        the guide does not draw from independent normals; for a layer whose input has something
        else in its first dim; for a module without linear layers and convolutions; for
        multi-sample bounds with K > 1.

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
        """The output of a layer: that of the means, and that of the noise with signs flipped."""
        x, weight, bias = layer.input, layer.weight, layer.bias
        mean = layer.function(x, weight.loc, None if bias is None else bias.loc)
        # Features are last in a linear layer, and after the examples in a convolution.
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
    """Random signs for each example and feature, the same at all positions and at each use."""
    if name not in noise:
        size = x.shape[0], x.shape[dim]
        signs = torch.randint(0, 2, size, device=x.device, dtype=x.dtype)
        noise[name] = signs.mul_(2).sub_(1)
    shape = [1] * x.dim()
    shape[0], shape[dim] = noise[name].shape
    return noise[name].reshape(shape)
