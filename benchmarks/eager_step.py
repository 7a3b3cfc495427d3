"""Time of an eager ``SVI.step`` over that of Pyro's ``RenyiELBO(alpha=0)``.

Both train the 784-200-200-50 VAE, vectorised, under the same validation setting. The second
RenyiELBO shows how far equal steps come apart.
"""

from collections.abc import Iterator

import pyro
from pyro.infer import SVI, RenyiELBO

from benchmarks.harness import Options, Table, compare
from benchmarks.vae import VAE, random_images
from pyro_ext.infer import ImportanceWeightedELBO, JackknifeELBO


def tables(options: Options) -> Iterator[Table]:
    """Ratios for both validation settings and four sizes."""
    ratio = "ratio to RenyiELBO"
    columns = ["validation", "batch", "K", "objective", "ms", ratio]
    table = Table("Eager step", columns, chart=(columns[:4], ratio))
    for validation in (True, False):
        for batch_size, K in ((20, 5), (20, 50), (100, 5), (100, 50)):
            renyi = {"num_particles": K, "vectorize_particles": True, "max_plate_nesting": 1}
            objectives = {
                "RenyiELBO": RenyiELBO(**renyi),
                "RenyiELBO again": RenyiELBO(**renyi),
                "ImportanceWeightedELBO": ImportanceWeightedELBO(K, max_plate_nesting=1),
                "JackknifeELBO, order 1": JackknifeELBO(
                    K, 1, "jackknife", "published", max_plate_nesting=1
                ),
                "JackknifeELBO, order 2": JackknifeELBO(
                    K, 2, "jackknife", "published", max_plate_nesting=1
                ),
            }
            pyro.clear_param_store()
            images = random_images(batch_size, options.device)
            with pyro.validation_enabled(validation):
                steps = {}
                for name, objective in objectives.items():
                    vae = VAE(name).to(options.device)
                    optim = pyro.optim.Adam({"lr": 1e-3})
                    svi = SVI(vae.model, vae.guide, optim, objective)
                    steps[name] = lambda svi=svi, images=images: svi.step(images)
                for name, found in compare(steps, options).items():
                    table.rows.append([validation, batch_size, K, name, *found])
    yield table
