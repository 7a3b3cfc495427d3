"""Compares a run with the checkpoint from which it continues."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro_ext._arguments import abbreviate, describe

_UNKNOWN = object()


@dataclass
class Comparison:
    """The differences between a run and a checkpoint.

    :param path: the path of the checkpoint, for the error message.
    :param allowed: the names of settings that may differ. A name stands for all settings below it,
        such as ``"optimizer"`` for ``"optimizer.lr"``.
    :ivar overruled: the names of the settings that differ and may differ.
    """

    path: Any
    allowed: Collection[str] = ()
    overruled: set[str] = field(default_factory=set)
    _known: dict[str, None] = field(default_factory=dict)
    _refused: list[str] = field(default_factory=list)
    _differing: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = self.allowed
        is_list = isinstance(names, Collection) and not isinstance(names, (str, bytes))
        wrong = [name for name in names if not isinstance(name, str)] if is_list else [names]
        if wrong:
            raise TypeError(
                "Checkpoint: allow_changes must be a list of names, but it has "
                f"{describe(wrong[0])}. Pass a list such as ['optimizer.lr']."
            )

    def compare(self, name: str, now: Any, before: Any, is_same: bool | None = None) -> bool:
        """Compare a setting, and return whether it is the same.

        :param name: the name of the setting.
        :param now: its value in the run.
        :param before: its value in the checkpoint.
        :param is_same: the result of a comparison that equality cannot make.
        """
        self._known[name] = None
        if is_same is None:
            is_same = now == before or repr(now) == repr(before)  # NaN equals NaN
        if is_same:
            return True
        if any(_is_below(name, allowed) for allowed in self.allowed):
            self.overruled.add(name)
        else:
            self._differing[name] = f"'{name}' is {_text(now)}, but it was {_text(before)}."
        return False

    def compare_all(
        self,
        now: Mapping[str, Any],
        before: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Compare many settings. Parents, such as classes, come before the settings below them.

        :param now: the settings of the run.
        :param before: the settings of the checkpoint.
        :param defaults: the values of settings that one of the two leaves out. A setting that has
            none is then not compared.
        """
        defaults = defaults or {}
        self._known |= dict.fromkeys(defaults)
        differing: list[str] = []
        for name in {**now, **before}:
            pair = [settings.get(name, defaults.get(name, _UNKNOWN)) for settings in (now, before)]
            is_of_other = any(_is_below(name, parent) for parent in differing)
            if _UNKNOWN in pair or is_of_other:
                self._known[name] = None
            elif not self.compare(name, *pair):
                differing.append(name)

    def refuse(self, sentence: str) -> None:
        """Add a difference that cannot be overruled."""
        self._refused.append(sentence)

    def finish(self) -> None:
        """Raise an error that names all differences, if there are any.

        :raises ValueError: if there are differences, or if ``allowed`` has unknown names.
        """
        unknown = [x for x in self.allowed if not any(_is_below(name, x) for name in self._known)]
        if unknown:
            raise ValueError(
                f"Checkpoint: allow_changes has {unknown}, but the names are "
                f"{abbreviate(self._known, 50)}."
            )
        if not self._refused and not self._differing:
            return
        advice = []
        if self._refused:
            advice.append("Load it with the model and guide that saved it.")
        if self._differing:
            advice.append(
                "Restore the old values, or pass the names of the values that are to change: "
                f"allow_changes={list(self._differing)}."
            )
        sentences = [*self._refused, *self._differing.values(), *advice]
        raise ValueError("\n".join([f"Checkpoint: {self.path} does not fit this run.", *sentences]))


def _is_below(name: str, parent: str) -> bool:
    """Return whether a setting is the parent, or belongs to it."""
    return name == parent or (name.startswith(parent) and name[len(parent)] in ".[")


def _text(value: Any) -> str:
    text = value if isinstance(value, _Text) else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


class _Text(str):
    """A description, to be printed without quotation marks."""


def as_text(value: Any) -> str:
    """Return a text that an error message prints without quotation marks."""
    return _Text(value)
