"""Imported once, by the fork server, so that every rank is born with these modules in memory."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil

HEAVY = (
    "pytest",
    "numpy",
    "safetensors.torch",
    "torch.distributed",
    "torch.distributed.device_mesh",
    "torch.distributed._functional_collectives",
    "torch._dynamo",  # torch.optim imports it at the first step
    "torch.utils.checkpoint",
)


def preload(names: tuple[str, ...]) -> None:
    """Import what can be imported; a rank that needs a broken module reports the error itself."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def modules_under(package: str) -> tuple[str, ...]:
    """Names of all modules of a package, without importing them."""
    spec = importlib.util.find_spec(package)
    paths = list(spec.submodule_search_locations or []) if spec else []
    names: list[str] = []
    for info in pkgutil.iter_modules(paths, f"{package}."):
        names += [info.name, *(modules_under(info.name) if info.ispkg else ())]
    return tuple(name for name in names if not name.endswith("__main__"))


preload(HEAVY)
preload(modules_under("megatron_ds"))
