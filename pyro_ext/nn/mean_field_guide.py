import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal, TransformedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.nn.functional import softplus

from pyro_ext._arguments import check_positive, check_type
from pyro_ext._private.of_torch import children_of
from pyro_ext.nn.bayesian_module import BayesianModule


class MeanFieldGuide(PyroModule):
    r"""A guide of independent normals for the latent parameters of a :class:`BayesianModule`.

    .. math:: \theta = \mu + \log(1 + e^\rho) \, \epsilon, \qquad \epsilon \sim \mathcal{N}(0, 1)

    The parameters mu and rho are in :attr:`locs` and :attr:`rhos`, under the names of the module.
    If the prior of a site has a constrained support, the normal is transformed to that support.

    :param module: the module. It may be a part of the model. Other latent sites of the model, such
        as hyperparameters, need their own guide.
    :param init_scale: the initial standard deviation, > 0.
    :param init_loc: the initial means: a function of a name and of the value that the parameter had
        in the module. With None, each mean starts at that value.
    :raises TypeError: if an argument has the wrong type.
    :raises ValueError: if ``init_scale`` is not positive, or if ``init_loc`` returns another shape.

    Source: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), Weight Uncertainty in Neural
    Networks, section 3.2.

    >>> import pyro.distributions as dist
    >>> module = BayesianModule(nn.Linear(3, 2), prior=dist.Normal(0.0, 1.0))
    >>> guide = MeanFieldGuide(module, init_scale=0.1)
    >>> {name: tuple(value.shape) for name, value in guide().items()}
    {'weight': (2, 3), 'bias': (2,)}
    >>> posterior = guide.distributions()["weight"]
    >>> (posterior.base_dist.loc == module.net.weight).all(), posterior.base_dist.scale[0, 0]
    (tensor(True), tensor(0.1000, grad_fn=<SelectBackward0>))
    """

    def __init__(
        self,
        module: BayesianModule,
        init_scale: float = 0.05,
        init_loc: Callable[[str, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_type("MeanFieldGuide", "module", module, BayesianModule, "a BayesianModule")
        check_positive("MeanFieldGuide", "init_scale", init_scale)
        # The tuple keeps the module from becoming a submodule of the guide.
        self._module = (module,)
        #: The means in unconstrained space: a module with the names of the latent parameters.
        self.locs = nn.Module()
        #: The inverse softplus of the standard deviations: a module with the same names.
        self.rhos = nn.Module()
        rho = init_scale + math.log(-math.expm1(-init_scale))
        self._supports = {}
        for name in module.latent_names:
            value = module.value_of(name)
            with poutine.block():
                self._supports[name] = module.prior_of(name).support
            loc = value if init_loc is None else init_loc(name, value)
            if loc.shape != value.shape:
                raise ValueError(
                    f"MeanFieldGuide: init_loc returns shape {tuple(loc.shape)} for '{name}'. "
                    f"Return a tensor of the parameter's shape, {tuple(value.shape)}."
                )
            loc = biject_to(self._supports[name]).inv(loc.detach().to(value))
            _register(self.locs, name, loc.clone())
            _register(self.rhos, name, torch.full_like(loc, rho))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw the latent parameters.

        :param args: not used.
        :param kwargs: not used.
        :returns: a dict from site name to draw.
        """
        return {name: pyro.sample(name, fn) for name, fn in self.distributions().items()}

    def distributions(self) -> dict[str, TorchDistributionMixin]:
        """Return the distribution of each site, with gradients to :attr:`locs` and :attr:`rhos`.

        :returns: a dict from site name to distribution.
        """
        (module,) = self._module
        locs, rhos = dict(self.locs.named_parameters()), dict(self.rhos.named_parameters())
        found = {}
        for name in module.latent_names:
            loc, scale = locs[name], softplus(rhos[name])
            fn = Normal(loc, scale).to_event(loc.dim())
            support = self._supports[name]
            if not _is_real(support):
                fn = TransformedDistribution(fn, biject_to(support))
            found[module.site_name(name)] = fn
        return found


def _register(tree: nn.Module, name: str, value: Tensor) -> None:
    """Add a parameter under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in children_of(tree):
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.register_parameter(last, nn.Parameter(value))


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real
