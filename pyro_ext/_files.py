"""Files of tensors, numbers, strings and containers of these. To load one never runs code."""

import io
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_ext._digest import digest

StrPath = str | os.PathLike[str]

_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def to_plain(value: Any, name: str) -> Any:
    """Return a value with plain containers, Python numbers and tensors only.

    :param value: the value.
    :param name: its name, for the error message.
    :raises TypeError: if it contains something else.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.as_tensor(value)
    if isinstance(value, Tensor) and not _has_own_memory_layout(value):
        own = value.detach()
        own = own if type(own) is Tensor else own.as_subclass(Tensor)
        is_view = own.layout == torch.strided and own.untyped_storage().nbytes() != own.nbytes
        return own.clone() if is_view else own
    if isinstance(value, Mapping):
        return {to_plain(k, name): to_plain(x, f"{name}[{k!r}]") for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [to_plain(x, f"{name}[{i}]") for i, x in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{name} is of type {type(value).__name__}, which a file cannot hold. Only tensors, "
        "numbers, strings, lists, tuples and dicts can be saved."
    )


def write_file(path: StrPath, kind: str, version: int, content: dict[str, Any]) -> None:
    """Write a file. Whatever happens, the path holds either the old file or the whole new one.

    :param path: the path. The file that a link points to is replaced, and not the link.
    :param kind: what the file holds, such as "pyro_ext training run".
    :param version: the version of its format.
    :param content: the content.
    :raises TypeError: if the content cannot be held by a file.
    :raises OSError: if the file cannot be written. It names the path.
    """
    plain = to_plain(content, kind)
    whole = {"format": kind, "version": version, "checksum": digest(plain), "content": plain}
    target = _target(path)
    unfinished = _unfinished(target)
    try:
        file = open(unfinished, "xb")  # noqa: SIM115 - what it did not create, it does not remove
        try:
            with file:
                torch.save(whole, file)
                if target.exists():
                    os.chmod(unfinished, target.stat().st_mode & 0o7777)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, target)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: StrPath) -> None:
    """Raise an error if a file cannot be written to a path. The path itself is left alone.

    :raises OSError: if the path is not a regular file, or its folder cannot be written to.
    """
    unfinished = _unfinished(_target(path))
    try:
        with open(unfinished, "xb"):
            pass
        unfinished.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_file(path: StrPath, kind: str, version: int) -> dict[str, Any]:
    """Return the content of a file that :func:`write_file` wrote.

    :param path: the path.
    :param kind: what the file must hold.
    :param version: the newest version that can be read.
    :returns: the content.
    :raises ValueError: if the file is damaged, or is no such file.
    :raises OSError: if the file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        whole = torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        if "deserialize object on" in str(error):  # a device that this machine lacks
            raise ValueError(f"{path} cannot be loaded here: {error}") from error
        raise ValueError(
            f"{path} is damaged, or is not a {kind} that can be loaded safely. Pass a file that "
            "this version of pyro_ext has saved."
        ) from error
    if not isinstance(whole, dict) or whole.get("format") != kind:
        raise ValueError(f"{path} is not a {kind}. Pass a file that was saved as one.")
    if whole.get("version") != version:
        raise ValueError(
            f"{path} is a {kind} of version {whole.get('version')}, but this version of pyro_ext "
            f"reads version {version}."
        )
    content: dict[str, Any] = whole.get("content", {})
    if whole.get("checksum") != digest(content):
        raise ValueError(f"{path} is damaged: its checksum does not fit its content.")
    return content


def _has_own_memory_layout(value: Tensor) -> bool:
    """Return whether a tensor is a wrapper of others, which no plain tensor can stand for."""
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _target(path: StrPath) -> Path:
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"'{path}' is not a regular file, so it is not replaced. Pass another path.")
    return target


def _unfinished(target: Path) -> Path:
    """Return a name that no other writer uses, in the same folder."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}.unfinished")


def _sync_folder(folder: Path) -> None:
    with suppress(PermissionError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
