"""Saves the training run of an SVI to a file, and loads it."""

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import pyro
from pyro.infer import SVI

from pyro_ext._files import StrPath, to_plain
from pyro_ext._interruption import postponed_interrupts
from pyro_ext._random_states import compact_random_states, random_states, set_random_states
from pyro_ext.infer.kl.kl_weighted import KLWeightedELBO
from pyro_ext.infer.svi.capture.operation_log import set_up
from pyro_ext.infer.svi.capture.reachable_search import find_reachable
from pyro_ext.infer.svi.checkpoint import ProgramState, new_params_removed_on_error, write
from pyro_ext.infer.svi.comparison import Comparison
from pyro_ext.infer.svi.history import TrainingHistory
from pyro_ext.infer.svi.optimizer_states import check_states
from pyro_ext.infer.svi.run_settings import defaults_of, objective_settings, optimizer_settings


def save_run(svi: Any, path: StrPath, data: Any = None, is_joint: bool = False) -> None:
    """Save the run of an ``EagerSVI``.

    :param svi: the SVI.
    :param path: the path of the file.
    :param data: the data of the run, for the states of its own generators.
    :param is_joint: whether all processes save the run now. Then only rank 0 writes the file.
    """
    schedule, store = schedule_of(svi.objective), pyro.get_param_store()
    names = [store.param_name(param) for param in svi.optim.optim_objs]
    content = _program_state(svi, svi._called).content() | {
        "settings": _settings(svi, filter(None, names)) | svi._run_settings,
        "schedule": None if schedule is None else schedule.state_dict(),
        "history": svi.history.state_dict(),
    }
    own = {
        "random": compact_random_states(random_states(data)),
        "epoch_start": svi._epoch_start and compact_random_states(svi._epoch_start),
    }
    group = svi._group
    content |= own | {"group": group and group.state(own, is_joint)}
    if group is not None and is_joint:
        group.processes.result_of_first(lambda: write(content, path), f"{group.owner}.run")
    else:
        write(content, path)


def load_run(
    svi: Any,
    content: dict[str, Any],
    comparison: Comparison,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    data: Any = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Load the run of an ``EagerSVI``. Everything is compared before anything changes.

    :param svi: the SVI.
    :param content: the content of the file.
    :param comparison: takes the differences.
    :param args: positional arguments of model and guide.
    :param kwargs: keyword arguments of model and guide.
    :param data: the data of the run, for the states of its own generators.
    :param settings: the settings of the run, to be compared as well.
    """
    group = svi._find_group()
    # An interrupt waits until all is restored.
    with postponed_interrupts(), new_params_removed_on_error():
        # A first run of the programs may initialise state, so it must come before loading.
        called, used = set_up(lambda: SVI.evaluate_loss(svi, *args, **kwargs))
        in_store = filter(pyro.get_param_store().__contains__, used)
        now, before = _settings(svi, in_store) | (settings or {}), content["settings"]
        comparison.compare_all(now, before, defaults_of(svi.optim, now, before))
        restore = _program_state(svi, called).prepare(content, used, comparison)
        history = TrainingHistory.from_state_dict(content["history"])
        comparison.finish()
        schedule, step = schedule_of(svi.objective), content["schedule"]
        if schedule is not None and step is not None:
            deepcopy(schedule).load_state_dict(step)  # fails before anything has changed
        restore()
        if schedule is not None and step is not None:
            schedule.load_state_dict(step)
        svi.history = history
        svi._called = called
        own = {key: content[key] for key in ("random", "epoch_start")}
        if group is not None:
            own = group.load(content.get("group"), own)
        svi._epoch_start = own["epoch_start"]
        set_random_states(own["random"], data)


def check_state(svi: Any) -> None:
    """Raise an error if a file cannot hold the state, before steps are spent on it.

    :raises TypeError: if a file cannot hold it. The message names where.
    """
    check_states(svi.optim)
    schedule = schedule_of(svi.objective)
    if schedule is not None:
        to_plain(schedule.state_dict(), "The state of the KL schedule, state")


def schedule_of(objective: Any) -> Any:
    """Return the KL schedule of an objective, or None."""
    return objective.schedule if isinstance(objective, KLWeightedELBO) else None


def _settings(svi: Any, params: Iterable[str]) -> dict[str, Any]:
    return optimizer_settings(svi.optim, params) | objective_settings(svi.objective)


def _program_state(svi: Any, called: Any) -> ProgramState:
    roots = [("model", svi.model), ("guide", svi.guide), ("loss", svi.objective)]
    return ProgramState(find_reachable(roots, limit=math.inf), called, svi.optim)
