import copy
from collections.abc import Callable, Collection
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pyro_ext._arguments import describe
from pyro_ext._private.of_pyro import name_of
from pyro_ext._private.of_torch import children_of, parameters_of
from pyro_ext.nn.batched_call import BatchedCall
from pyro_ext.nn.priors import Prior, check_support, is_fixed, prior_of


class BayesianModule(PyroModule):
    r"""Any torch module with latent parameters: a Bayesian neural network.

    .. math:: \theta_j \sim p_j, \qquad \mathrm{output} = f_\theta(\mathrm{input})

    Each parameter of the module is a latent site with the parameter's name, such as ``"0.weight"``.
    A parameter that several submodules share is one site. Call the module outside the plate of the
    data. Inside the plate, each data point would get its own weights.

    Draws may have leading dims, for example those of K vectorised particles or of
    ``Predictive(parallel=True)``. The outputs then have these leading dims too: their shape is
    ``(K, B, C)`` instead of ``(B, C)``. Vectorised draws have dims of size 1 at the
    positions of the plates; these dims are removed from the outputs. If the model has n nested
    plates, the output of ``net`` for one draw must have n batch dims. The particle dim is then to
    the left of the plates.

    The draws run under ``torch.func.vmap`` if PyTorch can batch everything that the module does.
    Otherwise they run in a loop, for example for LSTMs. The results are the same, except for the
    masks of dropout.

    The module is copied. The copy, ``net``, keeps the values of the latent parameters as buffers.
    Its ``parameters()`` are therefore only the other parameters, which are learnt as point
    estimates.

    :param net: the module, with initialised parameters. It must not be a ``PyroModule``.
    :param prior: a Pyro distribution that expands to the shape of every parameter, or a function of
        a name and a parameter that returns a distribution. Its tensors are moved to the parameter's
        dtype and device. A function is called at each draw, so it can draw hyperparameters. These
        are latent sites, and the guide must draw them as well.
    :param sites: the latent parameters: ``"all"``, a collection of names, or a function from a name
        to a bool.
    :raises TypeError: if an argument or the result of a prior function has the wrong type.
    :raises ValueError: if the module has no parameter, or none that ``sites`` matches; if a
        parameter is not initialised or not real; or if a prior does not match the shape of a
        parameter, is discrete, or has a support that does not contain the parameter's value.

    Source: Blundell, Cornebise, Kavukcuoglu and Wierstra (2015), Weight Uncertainty in Neural
    Networks.

    >>> import pyro.distributions as dist, torch
    >>> from pyro.infer import SVI, Trace_ELBO
    >>> from pyro_ext.nn import MeanFieldGuide
    >>> net = BayesianModule(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)),
    ...                      prior=dist.Normal(0.0, 1.0))
    >>> def model(x, y):
    ...     loc = net(x).squeeze(-1)
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(loc, 0.1), obs=y)
    >>> guide = MeanFieldGuide(net)
    >>> elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    >>> loss = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(torch.randn(5, 2),
    ...                                                                   torch.randn(5))
    >>> net.latent_names
    ('0.weight', '0.bias', '2.weight', '2.bias')
    """

    def __init__(
        self,
        net: nn.Module,
        prior: Prior,
        sites: str | Collection[str] | Callable[[str], bool] = "all",
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module) or isinstance(net, PyroModule):
            raise TypeError(
                f"BayesianModule: net must be a plain torch.nn.Module, but it is {describe(net)}."
            )
        if not callable(prior):  # a distribution is callable too
            raise TypeError(
                "BayesianModule: prior must be a Pyro distribution or a function of a name and a "
                f"parameter, but it is {describe(prior)}."
            )
        #: The names of the latent parameters.
        self.latent_names = _latent_names(net, sites)
        for name in self.latent_names:
            parameter = net.get_parameter(name)
            with poutine.block():  # hides hyperparameters that the prior draws
                check_support(prior_of(prior, name, parameter), name, parameter)
        self.prior = prior
        self.net, aliases = _with_buffers(net, self.latent_names)
        self._call = BatchedCall(aliases)
        self._priors: dict[str, tuple[Any, TorchDistributionMixin]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_priors": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the latent parameters, and call the module with them.

        :param args: positional arguments of the module.
        :param kwargs: keyword arguments of the module.
        :returns: the output of the module.
        """
        draws = {
            name: pyro.sample(self.site_name(name), self.prior_of(name))
            for name in self.latent_names
        }
        return run_module(self._call, self.net, draws, args, kwargs)

    def site_name(self, name: str) -> str:
        """Return the site name of a latent parameter.

        If this module has a name, the site name is the module's name and the parameter's name,
        separated by a dot. Otherwise it is the parameter's name.

        :param name: the name of the parameter in the module.
        :returns: the site name.
        """
        own_name = name_of(self)
        return f"{own_name}.{name}" if own_name else name

    def value_of(self, name: str) -> Tensor:
        """Return the value that a latent parameter had in the module.

        :param name: the name of the parameter in the module.
        :returns: a tensor of the parameter's shape.
        """
        # Attribute access would register the other parameters in a running program.
        return children_of(self)["net"].get_buffer(name)

    def prior_of(self, name: str) -> TorchDistributionMixin:
        """Return the prior of a latent parameter.

        :param name: the name of the parameter in the module.
        :returns: a distribution whose event shape is the parameter's shape.
        """
        value = self.value_of(name)
        if not isinstance(self.prior, TorchDistributionMixin) or not is_fixed(self.prior):
            return prior_of(self.prior, name, value)
        kind = id(self.prior), value.dtype, value.device
        if name not in self._priors or self._priors[name][0] != kind:
            self._priors[name] = kind, prior_of(self.prior, name, value)
        return self._priors[name][1]


@effectful(type="bayesian_module")
def run_module(
    call: BatchedCall, net: nn.Module, draws: dict[str, Tensor], args: Any, kwargs: Any
) -> Any:
    """Call a module with drawn parameters. This is an effect, so handlers can replace it."""
    return call(net, draws, args, kwargs)


def _latent_names(
    net: nn.Module, sites: str | Collection[str] | Callable[[str], bool]
) -> tuple[str, ...]:
    names = [name for name, _ in net.named_parameters()]
    if not names:
        raise ValueError(
            f"BayesianModule: {type(net).__name__} has no parameters. Pass a module that has some."
        )
    for name, parameter in net.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"BayesianModule: parameter '{name}' has no shape yet. Call the module on data "
                "before you pass it."
            )
        if not parameter.is_floating_point():
            raise ValueError(
                f"BayesianModule: parameter '{name}' has dtype {parameter.dtype}. All parameters "
                "must have a real floating-point dtype."
            )
    if isinstance(sites, str):
        if sites != "all":
            raise ValueError(
                f"BayesianModule: sites is {describe(sites)}. Pass 'all', a list of parameter "
                "names, or a function from a name to a bool."
            )
        return tuple(names)
    if not callable(sites):
        unknown = sorted(set(sites) - set(names))
        if unknown:
            raise ValueError(
                f"BayesianModule: sites names {_listed(unknown)}, but the parameters are "
                f"{_listed(names)}. Pass names of parameters."
            )
    choose = sites if callable(sites) else set(sites).__contains__
    chosen = tuple(name for name in names if choose(name))
    if not chosen:
        raise ValueError(
            f"BayesianModule: sites matches none of the parameters {_listed(names)}. Choose at "
            "least one."
        )
    return chosen


def _listed(names: list[str], most: int = 8) -> str:
    """Return the first names of a list, and the number of the others, for an error message."""
    num_left = len(names) - most
    return f"{names[:most]}" + (f" and {num_left} more" if num_left > 0 else "")


def _with_buffers(net: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, dict[str, str]]:
    """Return a copy with some parameters turned into buffers, and the further names of shared ones.

    Latent parameters become buffers so that they are not learnt.
    """
    net = copy.deepcopy(net)
    first_names = {id(net.get_parameter(name)): name for name in names}
    buffers = {name: net.get_parameter(name).detach() for name in names}
    aliases = {}
    for path, parameter in list(net.named_parameters(remove_duplicate=False)):
        name = first_names.get(id(parameter))
        if name is None:
            continue
        if path != name:
            aliases[path] = name
        prefix, _, last = path.rpartition(".")
        module = net.get_submodule(prefix)
        del parameters_of(module)[last]
        module.register_buffer(last, buffers[name])
    return net, aliases
