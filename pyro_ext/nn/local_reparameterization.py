import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ext.nn.per_example_noise import Layer, NoisePerExample


class local_reparameterization(NoisePerExample):
    r"""A context manager that draws the outputs of linear layers instead of their weights.

    .. math:: y_n \sim \mathcal{N}\Bigl(\textstyle\sum_i x_{ni} \mu_i + \mu_b,\;
        \textstyle\sum_i x_{ni}^2 \sigma_i^2 + \sigma_b^2\Bigr)

    Use it around SVI steps or evaluations of a model with a :class:`BayesianModule`. Layers that
    are not linear use the drawn weights.

    Under a guide of independent normals, each example's output has the same distribution as with
    drawn weights, but its own noise. The gradient of the ELBO therefore has the same mean as with
    drawn weights, and a lower variance.

    The loss must be a sum over examples. Each term must depend only on its own example's row of the
    layers' outputs. For example, a product with an adjacency matrix after the layers violates this
    condition. Do not use local reparameterisation with nonlinear bounds. The multi-sample bounds of
    this package raise an error. Pyro's ``RenyiELBO`` with several particles in a loop cannot be
    detected, and gives wrong results.

    :raises ValueError: in a run: if there is more than one draw of the weights at a time; if the
        guide does not draw the weights from independent normals; if weights are shared, because a
        layer has several rows for one example or is used twice; if the module has no linear layers;
        or for multi-sample bounds with K > 1.

    Source: Kingma, Salimans and Welling (2015), Variational Dropout and the Local
    Reparameterization Trick.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer import SVI, TraceMeanField_ELBO
    >>> from pyro_ext.nn import BayesianModule, MeanFieldGuide
    >>> net = BayesianModule(torch.nn.Linear(3, 1), prior=dist.Normal(0.0, 1.0))
    >>> def model(x, y):
    ...     loc = net(x).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(loc, 0.1), obs=y)
    >>> svi = SVI(model, MeanFieldGuide(net), pyro.optim.Adam({"lr": 0.01}), TraceMeanField_ELBO())
    >>> with local_reparameterization():
    ...     loss = svi.step(torch.randn(5, 3), torch.randn(5))
    """

    functions = (F.linear,)

    def output(self, layer: Layer) -> Tensor:
        """Return a draw of the output of a layer, given the means and variances of its weights.

        :param layer: one use of a layer.
        :returns: a tensor with the shape of the layer's output.
        """
        if layer.input.dim() != 2:
            self.refuse(
                f"the layer of '{layer.name}' has an input of shape {tuple(layer.input.shape)}, "
                "not one row for each example. All positions of an example share the weights. Use "
                "flipout."
            )
        if layer.noise or layer.bias_noise:
            self.refuse(
                f"the layer of '{layer.name}' is used more than once, and its uses share the "
                "weights. Use flipout."
            )
        layer.noise["is_used"] = layer.bias_noise["is_used"] = True
        x, weight, bias = layer.input, layer.weight, layer.bias
        mean = layer.function(x, weight.loc, None if bias is None else bias.loc)
        variance = torch.zeros_like(mean)
        if weight.scale is not None:
            variance = layer.function(x.square(), weight.scale.square(), None)
        if bias is not None and bias.scale is not None:
            variance = variance + bias.scale.square()
        # A row of zeros has no noise, and the square root has no derivative there.
        is_zero = variance == 0
        scale = variance.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
        return mean + scale * torch.randn_like(mean)
