"""Files of torch.save that others wrote, read without running anything that they say; the only place that unpickles.

torch's own restricted unpickler does the reading. It knows tensors and plain values; to these we add argparse.Namespace
and, for classes of Megatron, DeepSpeed and numpy that lie about in such files, a stand-in that does nothing.
"""

from __future__ import annotations

import argparse
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_ds.errors import CheckpointError

_PACKAGES = ("apex", "deepspeed", "fp16", "megatron", "numpy", "transformer_engine")
_CLASSES = (
    "_io.BytesIO",
    "builtins.getattr",  # how some Pythons pickle a member of an Enum; the stand-in gets nothing
    "builtins.range",
    "builtins.slice",
    "datetime.timedelta",
    "pathlib.Path",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
)
_LEGACY_PICKLES = 4
"""Before torch 1.6 a file was a magic number, a version, facts about the machine and the object, then raw values."""


class Inert:
    """Stands for an object of a foreign class: keeps the values it was made of, forgets its state."""

    arguments: tuple[object, ...]

    def __new__(cls, *arguments: object) -> Inert:
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __setstate__(self, state: object) -> None:
        pass


def load_pickled(path: Path) -> dict[str, Any]:
    """What torch.save wrote: a dict whose tensors stay in the file until they are used.

    Raises: CheckpointError for a file that is missing, damaged, or names a class that is not on the list
    """
    try:
        zipped = zipfile.is_zipfile(path)
        foreign = sorted(name for name in _names(path, zipped) if name.split(".")[0] in _PACKAGES)
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (Inert, name) for name in (*_CLASSES, *foreign)
        ]
        with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        fix = "restore the file from where the checkpoint was copied"
        raise CheckpointError(str(path), error.strerror or str(error), "a readable file", fix) from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise _damaged(path, error) from None
        raise CheckpointError(
            str(path),
            f"a pickled {refused[1]}, which could run anything",
            "tensors, numbers, text, and the options of the run that wrote it",
            "load it where it was written and save its tensors alone, if you trust whoever wrote it",
        ) from None
    except Exception as error:  # a damaged pickle can fail in every way there is
        raise _damaged(path, error) from None
    if not isinstance(loaded, dict):
        raise CheckpointError(
            str(path), f"a {type(loaded).__name__}", "a dict with a model's tensors", "name another file"
        )
    return loaded


def _names(path: Path, zipped: bool) -> set[str]:
    """Every module.name that the file would import."""
    found: set[str] = set()
    for operations in _operations(path, zipped):
        found.update(text.replace(" ", ".") for code, text, _ in operations if code.name == "GLOBAL" and text)
    return found


def _operations(path: Path, zipped: bool) -> Iterator[Iterator[tuple[Any, Any, Any]]]:
    if zipped:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    yield pickletools.genops(archive.read(name))
        return
    with open(path, "rb") as file:
        for _ in range(_LEGACY_PICKLES):
            yield pickletools.genops(file)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return CheckpointError(
        str(path), f"a damaged file ({text[:200]})", "a file of torch.save", "restore it from where it was copied"
    )
