import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_ext.nn.per_example_noise import Layer, NoisePerExample


class local_reparameterization(NoisePerExample):
    r"""Draws the outputs of linear layers for each example, in place of their weights.

    .. math:: y_n \sim \mathcal{N}\Bigl(\textstyle\sum_i x_{ni} \mu_i + \mu_b,\;
        \textstyle\sum_i x_{ni}^2 \sigma_i^2 + \sigma_b^2\Bigr)

    Under a guide of independent normals each example's output has the distribution that it has
    with drawn weights, but noise of its own: the gradient of the ELBO has the same mean and less
    variance. Other layers use the weights that were drawn. A context manager around steps of SVI
    or evaluations; the model has a :class:`BayesianModule`. Not for nonlinear bounds: Pyro's
    ``RenyiELBO`` with several particles in a loop cannot be told, and is wrong.

    The loss must be a sum over examples, each of which depends on its own row in the layers
    alone: not so where layers are followed by a product with an adjacency matrix, say.

    Source: Kingma, Salimans and Welling (2015), Variational Dropout and the Local
    Reparameterization Trick.

    :raises ValueError: when run: for more than one draw of the weights at a time; for weights that
        the guide does not draw from independent normals; where weights are shared, by a layer
        with several rows for an example or one that is used twice; for a module without linear
        layers; for multi-sample bounds with K > 1.

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
        """The output of a layer: a draw, given the means and variances of its weights."""
        if layer.input.dim() != 2:
            self.refuse(
                f"expected one row for each example in the layer of '{layer.name}', got an input "
                f"of shape {tuple(layer.input.shape)}, whose positions share the weights: use "
                "flipout."
            )
        if layer.noise or layer.bias_noise:
            self.refuse(
                f"expected the layer of '{layer.name}' to be used once, and its uses share the "
                "weights: use flipout."
            )
        layer.noise["is_used"] = layer.bias_noise["is_used"] = True
        x, weight, bias = layer.input, layer.weight, layer.bias
        mean = layer.function(x, weight.loc, None if bias is None else bias.loc)
        variance = torch.zeros_like(mean)
        if weight.scale is not None:
            variance = layer.function(x.square(), weight.scale.square(), None)
        if bias is not None and bias.scale is not None:
            variance = variance + bias.scale.square()
        # A row of zeros has no noise, and the root no derivative there.
        is_zero = variance == 0
        scale = variance.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
        return mean + scale * torch.randn_like(mean)
