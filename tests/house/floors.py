"""Where every module lives: its floor and its room, as docs/architecture.md draws them."""

from __future__ import annotations

from collections.abc import Iterable

from tests.house.source import PACKAGE, Module, imports

GROUND = ("cli", "errors", "log", "timers")
ROOMS = {
    "parallel": 1, "kernels": 2, "model": 3, "data": 3, "pipeline": 4, "optim": 4, "checkpoint": 4, "training": 6,
    "convert": 7,
}  # fmt: skip
PLANNING = (
    "batch", "compat", "config", "deepspeed_json", "deepspeed_keys", "layouts", "limits", "plan", "presets", "rules",
    "rules_batch", "rules_layout", "rules_model", "rules_recompute", "stages", "ways",
)  # fmt: skip
FRONT_DOOR = 8
"""`megatron_ds` itself: it offers `pretrain`, so nothing inside may import from it."""


def place(name: str) -> tuple[int, str] | None:
    """(floor, room) of a module, None where the plan of the house has no such place."""
    parts = name.split(".")[1:]
    if not parts:
        return FRONT_DOOR, PACKAGE
    if len(parts) == 1 and parts[0] in GROUND:
        return 0, "ground"
    if parts[-1] == "config" and len(parts) == 2 and parts[0] in ROOMS:
        return 0, "ground"
    if len(parts) == 1 and parts[0] in PLANNING:
        return 5, "planning"
    return (ROOMS[parts[0]], parts[0]) if parts[0] in ROOMS else None


def violations(modules: Iterable[Module]) -> list[str]:
    """One line per import that points up or sideways, and per module that lives nowhere."""
    modules = list(modules)
    known = frozenset(module.name for module in modules)
    found = []
    for module in modules:
        here = place(module.name)
        if here is None:
            found.append(f"{module.at(module.tree)}: {module.name} has no floor; give it one in tests/house/floors.py")
            continue
        for item in imports(module, known):
            if item.target.split(".")[0] != PACKAGE:
                continue
            there = place(item.target)
            if there is None or not (there[0] < here[0] or there == here):
                word = "nowhere" if there is None else "up" if there[0] > here[0] else "sideways"
                found.append(f"{module.at(item.node)}: {module.name} imports {item.target}, which points {word}")
    return found


def circles(modules: Iterable[Module]) -> list[str]:
    """Every module that reaches itself through imports, with the way round."""
    modules = list(modules)
    known = frozenset(module.name for module in modules)
    edges = {m.name: {i.target for i in imports(m, known) if i.target in known} - {m.name} for m in modules}
    found, done = [], set[str]()

    def walk(name: str, way: tuple[str, ...]) -> None:
        if name in way:
            found.append(" -> ".join(way[way.index(name) :] + (name,)))
        elif name not in done:
            for target in sorted(edges[name]):
                walk(target, way + (name,))
            done.add(name)

    for name in sorted(edges):
        walk(name, ())
    return found
