"""Random programs, each with edits between its steps."""

import random
import warnings
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_ext.infer import CompiledSVI, ImportanceWeightedELBO, VariationalRenyiELBO
from tests.infer.svi.fuzzing.hidden_places import HIDDEN
from tests.infer.svi.fuzzing.places import PLACES

NUM_STEPS, AUDIT_EVERY = 30, 6
LOSSES = [
    Trace_ELBO,
    TraceMeanField_ELBO,
    lambda: Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    lambda: ImportanceWeightedELBO(3),
    lambda: ImportanceWeightedELBO(2, gradient="dreg"),
    lambda: VariationalRenyiELBO(0.5, 2),
]


class Run(NamedTuple):
    """The losses and parameters of a run, its warnings, and the error that ended it."""

    losses: list[float]
    params: dict[str, torch.Tensor]
    messages: list[str]
    error: Exception | None
    svi: SVI


class Fuzzed:
    """A program that reads some places, and edits of them before some of its steps.

    :param seed: the seed of all choices.
    """

    def __init__(self, seed):
        rng = random.Random(seed)
        names = rng.sample(sorted(PLACES), rng.randint(2, 4))
        if rng.random() < 0.3:
            names.append(rng.choice(sorted(HIDDEN)))
        self.names = names
        self.make_loss = rng.choice(LOSSES)
        self.is_auto = rng.random() < 0.3
        self.makes_optim = rng.choice([pyro.optim.Adam, pyro.optim.SGD, pyro.optim.ClippedAdam])
        self.edits = {}
        for _ in range(rng.randint(1, 4)):
            # An edit may change several places at once.
            for name in rng.sample(names, rng.randint(1, min(2, len(names)))):
                step = rng.randrange(1, NUM_STEPS - 10)
                self.edits.setdefault(step, []).append((name, rng.uniform(1.3, 3.0)))
        self.length_changes = rng.choice([None, None, rng.randrange(2, NUM_STEPS)])

    def run(self, cls, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        places = {name: {**PLACES, **HIDDEN}[name]() for name in self.names}
        reads = [read for read, _ in places.values()]

        def scale():
            total = 0.1
            for read in reads:
                total = total + 0.5 * read()
            return total

        def model(x):
            z = pyro.sample("z", dist.Normal(0.0, scale()))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x):
            loc = pyro.param("loc", torch.tensor(0.1))
            pyro.sample("z", dist.Normal(loc, 0.7))

        svi = cls(
            model,
            AutoNormal(model) if self.is_auto else guide,
            self.makes_optim({"lr": 0.01}),
            self.make_loss(),
            **options,
        )
        losses, error, x = [], None, torch.linspace(-1, 2, 8)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            try:
                for step in range(NUM_STEPS):
                    for name, value in self.edits.get(step, ()):
                        places[name][1](value)
                    losses.append(svi.step(x[:5] if step == self.length_changes else x))
            except Exception as caught:
                error = caught
        params = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
        messages = [str(w.message) for w in record if "CompiledSVI" in str(w.message)]
        return Run(losses, params, messages, error, svi)

    def outcome(self):
        """Compare CompiledSVI with SVI.

        :returns: "graph" or "eager" if all numbers are equal, "suspect" if a warning names all
            steps that differ, and otherwise a description of the failure.
        """
        expected = self.run(SVI)
        found = self.run(CompiledSVI, backend="eager", audit_every=AUDIT_EVERY)
        if repr(expected.error) != repr(found.error):
            return f"raises {found.error!r}, where SVI raises {expected.error!r}"
        pairs = enumerate(zip(expected.losses, found.losses, strict=True), start=1)
        wrong = [step for step, (a, b) in pairs if abs(a - b) > 1e-4 * (1 + abs(a))]
        params_differ = expected.params.keys() != found.params.keys() or any(
            not torch.allclose(p, found.params[name], rtol=1e-3, atol=1e-4)
            for name, p in expected.params.items()
        )
        if not wrong and not params_differ:
            return "graph" if found.svi._graphs.count else "eager"
        for message in found.messages:
            if "suspect" in message:
                audit = int(message.split("audit at step ")[1].split(" ")[0])
                since = int(message.split("after step ")[1].split(" ")[0])
                if (not wrong or since < wrong[0]) and audit - since <= 2 * AUDIT_EVERY:
                    return "suspect"
        return f"steps {wrong[:3]} differ without a word (parameters: {params_differ})"
