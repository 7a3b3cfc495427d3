"""Files hold what was written, and are refused if a bit has changed."""

import os
import random
import stat
import uuid

import numpy as np
import pytest
import torch

from pyro_ext._digest import digest
from pyro_ext._files import check_writable, read_file, write_file

CONTENT = {
    "tensor": torch.randn(3, 4)[1:, 1:],
    "half": torch.ones(2, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "number": (1, 2.5, float("nan"), None, True, 1j),
    "nested": {3: [torch.tensor(True), "text", b"bytes"]},
    "numpy": {"scalar": np.float64(0.1), "array": np.arange(4)},
}


def is_same(a, b):
    return digest(a) == digest(b)


def saved(path):
    write_file(path, "test", 1, CONTENT)
    return path


def test_content_is_read_as_it_was_written(tmp_path):
    content = read_file(saved(tmp_path / "a"), "test", 1)
    assert is_same({**content, "numpy": 0}, {**CONTENT, "numpy": 0})
    assert content["numpy"]["array"].tolist() == [0, 1, 2, 3]
    assert content["numpy"]["scalar"] == 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    torch.load(tmp_path / "a", weights_only=True)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(2)},
        {"a": torch.zeros(2, dtype=torch.float64)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.tensor([0.0, 1e-45])},
        {"a": [0.0, 0.0]},
        {"b": torch.zeros(2)},
        [torch.zeros(2)],
        {"a": np.zeros(2, dtype=np.float32)},
        {},
    ],
)
def test_a_digest_tells_values_apart(other):
    assert digest(other) == digest(other)
    assert (digest(other) == digest({"a": torch.zeros(2)})) == (
        isinstance(other, dict)
        and isinstance(other.get("a"), torch.Tensor)
        and other["a"].equal(torch.zeros(2))
        and other["a"].dtype == torch.float32
    )


@pytest.mark.long
def test_flipped_bits_are_refused_or_harmless(tmp_path):
    data = bytearray(saved(tmp_path / "a").read_bytes())
    rng = random.Random(0)
    refused = 0
    for _ in range(500):
        position, bit = rng.randrange(len(data)), rng.randrange(8)
        data[position] ^= 1 << bit
        (tmp_path / "b").write_bytes(data)
        data[position] ^= 1 << bit
        try:
            content = read_file(tmp_path / "b", "test", 1)
        except ValueError:
            refused += 1
        else:
            assert is_same({**content, "numpy": 0}, {**CONTENT, "numpy": 0})
    assert refused > 50


def test_a_malicious_file_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    for content in (Evil(), {"format": "test", "version": 1, "checksum": "", "content": Evil()}):
        torch.save(content, tmp_path / "a")
        with pytest.raises(ValueError, match=r"a is damaged, or is not a test that can be loaded"):
            read_file(tmp_path / "a", "test", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_of_another_kind_or_version_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        read_file(saved(tmp_path / "a"), "run", 1)
    with pytest.raises(ValueError, match="of version 1, but this version of pyro_ext reads"):
        read_file(saved(tmp_path / "a"), "test", 2)


def test_an_object_that_a_file_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"test\['a'\]\[1\] is of type object"):
        write_file(tmp_path / "a", "test", 1, {"a": [1, object()]})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_class_is_held_as_a_tensor(tmp_path):
    class Named(torch.Tensor):
        pass

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError

    value = torch.ones(3).as_subclass(Named)
    value.note = object()
    write_file(tmp_path / "a", "test", 1, {"a": value, "b": torch.nn.Parameter(torch.ones(2))})
    content = read_file(tmp_path / "a", "test", 1)
    assert [type(x) for x in content.values()] == [torch.Tensor] * 2
    with pytest.raises(
        TypeError, match=r"test\['a'\] is of type Wrapper, which a file cannot hold"
    ):
        write_file(tmp_path / "a", "test", 1, {"a": torch.ones(3).as_subclass(Wrapper)})


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "a.unfinished").symlink_to(tmp_path / "precious")
    saved(tmp_path / "a")
    # Even if somebody could guess the unique name:
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=7))
    guessed = tmp_path / f"a.{uuid.UUID(int=7).hex}.unfinished"
    guessed.symlink_to(tmp_path / "precious")
    for attempt in (check_writable, saved):
        with pytest.raises(FileExistsError, match="/a'"):
            attempt(tmp_path / "a")
    assert guessed.is_symlink()
    assert (tmp_path / "precious").read_text() == "kept"
    read_file(tmp_path / "a", "test", 1)


def test_permissions_and_links_are_kept(tmp_path):
    saved(tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = (tmp_path / "a").stat().st_ino
    saved(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").stat().st_ino != before
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_only_a_regular_file_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("folder", "fifo"):
        for attempt in (check_writable, saved):
            with pytest.raises(OSError, match=f"{name}' is not a regular file"):
                attempt(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "folder"]


def test_a_failure_names_the_path_and_leaves_nothing(tmp_path, monkeypatch):
    for attempt in (check_writable, saved):
        with pytest.raises(FileNotFoundError, match="none/a"):
            attempt(tmp_path / "none" / "a")
    check_writable(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    old = saved(tmp_path / "a").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"):
        saved(tmp_path / "a")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert (tmp_path / "a").read_bytes() == old
