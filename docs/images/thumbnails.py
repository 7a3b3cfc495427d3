"""Cuts one panel of each tutorial's figure for the gallery.

Run ``python docs/images/thumbnails.py`` after you replace a figure in this folder.
"""

from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
#: The left, upper, right and lower edge of the panel, as fractions of the figure.
PANELS = {
    "bayes_by_backprop": (0.675, 0.505, 1.0, 1.0),
    "bayesian_modules": (0.0, 0.0, 0.497, 1.0),
    "compiled_steps": (0.0, 0.0, 0.382, 1.0),
    "diagnose_with_arviz": (0.0, 0.0, 0.52, 0.497),
    "discrete_latents": (0.0, 0.0, 0.55, 1.0),
    "discretized_logistic": (0.08, 0.0, 0.92, 0.535),
    "exact_sums": (0.0, 0.0, 0.368, 1.0),
    "importance_sampling": (0.0, 0.0, 0.356, 1.0),
    "importance_weighted_autoencoders": (0.0, 0.0, 0.464, 0.487),
    "jackknife_bias": (0.336, 0.0, 0.68, 1.0),
    "jackknife_training": (0.0, 0.0, 0.345, 1.0),
    "marginal_likelihood": (0.0, 0.0, 0.337, 1.0),
    "model_comparison": (0.0, 0.0, 0.34, 1.0),
    "quickstart": (0.0, 0.0, 0.442, 1.0),
    "several_processes": (0.0, 0.0, 0.495, 1.0),
    "signal_to_noise": (0.0, 0.0, 0.323, 1.0),
    "training_loops": (0.5, 0.0, 1.0, 1.0),
}
#: ``compiled_steps.png`` is a figure of the benchmarks.
FILES = {"compiled_steps": "compiled_steps_tutorial.png"}

if __name__ == "__main__":
    (FOLDER / "thumbnails").mkdir(exist_ok=True)
    for name, box in PANELS.items():
        figure = Image.open(FOLDER / FILES.get(name, f"{name}.png")).convert("RGB")
        edges = [round(part * size) for part, size in zip(box, figure.size * 2, strict=True)]
        panel = figure.crop(tuple(edges))
        panel.thumbnail((800, 560))
        panel.save(FOLDER / "thumbnails" / f"{name}.png")
