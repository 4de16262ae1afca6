"""PREFIX.json beside PREFIX.bin and PREFIX.idx: which tokenizer wrote the ids, and how large they get.

The pair itself says neither, so without it a wrong tokenizer shows up as a bad loss, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ds.errors import DataError

_FORMAT = "megatron_ds dataset 1"
_MAX_BYTES = 1 << 16
"""A larger PREFIX.json is somebody's corpus, not ours."""


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """What the preprocessor knew about one .bin/.idx pair."""

    tokenizer_type: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    append_eod: bool
    max_token_id: int
    """-1 where there is no token at all."""
    documents: int
    sequences: int
    tokens: int

    def to_json(self) -> str:
        """The content of PREFIX.json."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"


def sidecar_path(prefix: str) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


def read_sidecar(prefix: str) -> Sidecar | None:
    """The sidecar of a pair, or None where there is none that we wrote: other systems write none."""
    path = sidecar_path(prefix)
    try:
        found = json.loads(path.read_bytes()) if path.stat().st_size <= _MAX_BYTES else None
    except (OSError, ValueError):
        return None
    fields = {field.name: field.type for field in dataclasses.fields(Sidecar)}
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        return None
    if any(type(found.get(name)).__name__ != kind for name, kind in fields.items()):
        return None
    return Sidecar(**{name: found[name] for name in fields})


def check_replaceable(prefix: str) -> None:
    """Raises: DataError if PREFIX.json is a file that we did not write, which a new dataset would overwrite."""
    path = sidecar_path(prefix)
    if path.exists() and read_sidecar(prefix) is None:
        raise DataError(
            str(path),
            found="a file that this tool did not write",
            expected="none",
            fix="choose another --output-prefix",
        )


def merged(parts: list[Sidecar]) -> Sidecar | None:
    """The sidecar of a concatenation, or None if the parts were not written with one tokenizer."""
    alike = {(p.tokenizer_type, p.tokenizer_fingerprint, p.vocab_size, p.eod, p.append_eod) for p in parts}
    if len(alike) != 1:
        return None
    counts: dict[str, Any] = {name: sum(vars(p)[name] for p in parts) for name in ("documents", "sequences", "tokens")}
    return dataclasses.replace(parts[0], max_token_id=max(p.max_token_id for p in parts), **counts)
