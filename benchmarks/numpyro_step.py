"""The training step of NumPyro, on the same network."""

import importlib.util
import itertools
from typing import Any

import numpy as np

from benchmarks.harness import Step


def is_installed() -> bool:
    """Whether NumPyro is there."""
    return importlib.util.find_spec("numpyro") is not None


def make_step(images: np.ndarray, num_particles: int) -> Step:
    """A jitted step of ``SVI`` with ``RenyiELBO(alpha=0)`` and Adam."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, RenyiELBO

    def mlp(name: str, x: Any, *sizes: int) -> Any:
        for i, (before, after) in enumerate(itertools.pairwise(sizes)):
            key = jax.random.PRNGKey(i)
            bound = before**-0.5
            weight = numpyro.param(
                f"{name}{i}", jax.random.uniform(key, (before, after), minval=-bound, maxval=bound)
            )
            x = x @ weight + numpyro.param(f"{name}{i}_bias", jnp.zeros(after))
            x = jnp.tanh(x) if i < len(sizes) - 2 else x
        return x

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(50), 1.0).to_event(1))
            logits = mlp("decoder", z, 50, 200, 200, 784)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(mlp("encoder", x, 784, 200, 200, 100), 2, axis=-1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    loss = RenyiELBO(alpha=0, num_particles=num_particles)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), loss)
    data = jnp.asarray(images)
    state = svi.init(jax.random.PRNGKey(0), data)
    update = jax.jit(svi.update)

    def step() -> float:
        nonlocal state
        state, loss = update(state, data)
        return float(loss)

    return step
