"""The house: public names, which module may import which, and how long a file or function is."""

import ast
import importlib
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyro_ext"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Where each public name has always been imported from.
PUBLIC = {
    "diagnostics": """Calibration Diagnosis compare_models diagnose from_pyro_svi loo
        plot_model_comparison simulation_based_calibration""",
    "distributed": "DistributedNoise ShardedDataset",
    "distributions": """DiscretizedLogistic DiscretizedLogisticMixture NormalScaleMixture
        RGBDiscretizedLogisticMixture""",
    "infer": """AnnealedEvidence ChiUpperELBO CombinedELBO CompiledSVI CyclicalKL EagerSVI
        EarlyStopping Evidence EvidenceHistory EvidenceState Expectation GeometricKL
        GradientDiagnostics ImportanceWeightedELBO JackknifeELBO KLSchedule KLWeightedELBO LinearKL
        MultiSampleELBO MultiplyImportanceWeightedELBO PartiallyImportanceWeightedELBO Particles
        PosteriorDraws TemperedEvidence ThermodynamicELBO TrainingHistory UniformKL
        VariationalRenyiELBO annealed_importance_sampling estimate_evidence estimate_expectation
        gradient_diagnostics sequential_monte_carlo""",
    "nn": "BayesianModule LeadingDims MeanFieldGuide flipout local_reparameterization",
    "ops": """MAX_SUBSETS MIN_DRAWS LogMoments TooManySubsetsError WeightStatistics
        accumulation_dtype bits_per_dim discretized_logistic_mixture_log_prob jackknife
        jackknife_coefficients leave_one_out_log_mean_exp leave_one_out_mean log_mean_exp
        may_need_gradient normal_scale_mixture_log_densities normal_scale_mixture_log_prob
        once_differentiable pareto_k""",
}

#: What each part may import beside itself; the arrows run one way.
BASE = {
    "_arguments",
    "_deprecated",
    "_digest",
    "_figures",
    "_files",
    "_interruption",
    "_private",
    "_random_states",
}
ARROWS = {
    **{name: {"_digest", "_private"} - {name} for name in BASE},
    "ops": {"_private"},
    "distributions": {"ops", *BASE},
    "nn": {"ops", *BASE},
    "distributed": {"ops", *BASE},
    "tracing": {"ops", *BASE},
    "infer.gradients": {"tracing", "ops", *BASE},
    "infer.bounds": {"infer.gradients", "tracing", "ops", *BASE},
    "infer.kl": {"infer.bounds", "tracing", "ops", *BASE},
    "infer.evidence": {"infer.svi", "distributed", "tracing", "ops", *BASE},
    "infer.annealing": {"infer.evidence", "infer.svi", "distributed", "tracing", "ops", *BASE},
    "infer.svi": {"infer.kl", "distributed", "tracing", "ops", *BASE},
    "diagnostics": {"infer", "distributed", "tracing", "ops", *BASE},
}


#: Private by name, and yet how a subclass of a distribution, handler or ELBO is written.
HOOKS = {
    "_extended_shape",
    "_get_checked_instance",
    "_get_trace",
    "_process_message",
    "_pyro_post_sample",
    "_pyro_sample",
    "_validate_args",
    "_validate_sample",
}


def part_of(module):
    """The part of the package that a module belongs to, such as ``infer.bounds``."""
    names = module.split(".")[1:]
    depth = 2 if names[:1] == ["infer"] else 1
    return ".".join(names[:depth])


def imports_of(path):
    """The modules of this package that a file imports, whether at its top or in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyro_ext"):
            yield node.module


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield path, node


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_where_they_were(package):
    module = importlib.import_module(f"pyro_ext.{package}")
    for name in PUBLIC[package].split():
        assert getattr(module, name) is not None
        assert name in module.__all__


def test_arrows_run_one_way():
    wrong = []
    for path in FILES:
        part = part_of(module_of(path))
        if part in ("", "infer"):  # facades
            continue
        for module in imports_of(path):
            other = part_of(module)
            if (
                other != part
                and other not in ARROWS[part]
                and other.split(".")[0] not in (ARROWS[part])
            ):
                wrong.append(f"{module_of(path)} imports {module}")
    assert wrong == []


def test_no_module_imports_itself_through_others():
    graph = {module_of(path): set(imports_of(path)) for path in FILES}
    graph = {name: {other for other in others if other in graph} for name, others in graph.items()}
    while graph:
        leaves = {name for name, others in graph.items() if not others}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert statistics.median(lengths.values()) < 150
    assert [str(path) for path, length in lengths.items() if length > 400] == []
    tests = sorted((ROOT / "tests").rglob("*.py"))
    assert [str(path) for path in tests if len(path.read_text().splitlines()) > 400] == []


def test_functions_are_short():
    too_long = []
    for path, node in functions():
        length = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            length -= node.body[0].end_lineno - node.body[0].lineno + 1
        if length > 60:
            too_long.append(f"{path.name}: {node.name}, {length} lines")
    assert too_long == []


def test_infer_holds_packages():
    assert len(list((PACKAGE / "infer").glob("*.py"))) <= 3


def test_private_names_are_in_one_place():
    """No other module reads an attribute that torch or Pyro keep private."""
    own = set(HOOKS)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.arg):
                own.add(node.arg)
    found = []
    for path in FILES:
        if "_private" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            module = node.module if isinstance(node, ast.ImportFrom) else ""
            is_private = name.startswith("_") and not name.startswith("__") and name not in own
            parts = (module or "").split(".")
            if parts[0] in ("torch", "pyro"):
                names = [*parts, *(alias.name for alias in node.names)]
                is_private = any(part.startswith("_") for part in names)
            if is_private:
                found.append(f"{path.name}: {name or module}")
    assert found == [], found
