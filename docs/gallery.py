"""How the gallery runs and sorts the tutorials; Sphinx finds these functions by name."""

import tempfile
from pathlib import Path
from typing import Any

ORDER = (
    "quickstart",
    "importance_weighted_autoencoders",
    "jackknife_bias",
    "jackknife_training",
    "signal_to_noise",
    "discrete_latents",
    "exact_sums",
    "bayes_by_backprop",
    "bayesian_modules",
    "discretized_logistic",
    "marginal_likelihood",
    "model_comparison",
    "importance_sampling",
    "diagnose_with_arviz",
    "compiled_steps",
    "training_loops",
    "several_processes",
)


def arguments(gallery_conf: dict[str, Any], script_vars: dict[str, str]) -> list[str]:
    """The command line of a tutorial, whose page takes the figure itself."""
    output = Path(tempfile.gettempdir()) / f"{Path(script_vars['src_file']).stem}.png"
    return ["--no-progress-bar", "--output", str(output)]


def smoke_arguments(gallery_conf: dict[str, Any], script_vars: dict[str, str]) -> list[str]:
    """The same for a few steps."""
    return ["--smoke", *arguments(gallery_conf, script_vars)]


def position(filename: str) -> int:
    """Where a tutorial stands in the gallery."""
    return ORDER.index(Path(filename).stem)
