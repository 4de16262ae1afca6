"""A Hugging Face directory: config.json and safetensors (or pytorch_model.bin, without running anything in it)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_ds.checkpoint.shard import strict_json
from megatron_ds.convert.family import Family, Fields
from megatron_ds.convert.homes import family_of, find_home, folded
from megatron_ds.convert.rules import Rule
from megatron_ds.convert.tokenizer_files import special_ids, tokenizer_in
from megatron_ds.convert.weights import Weights
from megatron_ds.errors import CheckpointError

SHARD_BYTES = 5 << 30
"""A file of tensors is no larger than this unless one tensor is."""
_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))


class _Tensors(Protocol):
    """What safe_open and torch.load give us: names, and a tensor by name."""

    def keys(self) -> Any: ...
    def get_tensor(self, name: str) -> torch.Tensor: ...


class _Pickled:
    """pytorch_model.bin, read by torch's unpickler of tensors only."""

    def __init__(self, path: Path):
        self.values: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    def keys(self) -> Any:
        """Names."""
        return self.values.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self.values[name]


class HubFolder:
    """Config and tensors of one directory; tensors stay on disk until they are asked for."""

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        self.config = self._json("config.json")
        self._at: dict[str, tuple[_Tensors, str]] = {}
        for path in self._weight_files():
            tensors = self._open(path)
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                modern = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
                self._at[modern] = tensors, name

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._at)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        tensors, stored = self._at[name]
        return tensors.get_tensor(stored)

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            found = strict_json(path.read_bytes())
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error), "a file of a Hugging Face model") from None
        except ValueError as error:
            raise _unreadable(path, f"{error}"[:200], "JSON") from None
        if not isinstance(found, dict):
            raise _unreadable(path, type(found).__name__, "a JSON object")
        return found

    def _weight_files(self) -> list[Path]:
        for stem, kind in _STEMS:
            index = f"{stem}.{kind}.index.json"
            if (self.path / index).exists():
                files = self._json(index).get("weight_map")
                names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
                for name in names:
                    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
                        raise _unreadable(self.path / index, f"file name {name!a:.80}", "plain file names")
                return [self.path / name for name in names]
            if (self.path / f"{stem}.{kind}").exists():
                return [self.path / f"{stem}.{kind}"]
        raise _unreadable(self.path, "no weights", "model.safetensors, or its index, or pytorch_model.bin")

    def _open(self, path: Path) -> _Tensors:
        try:
            if path.suffix == ".bin":
                return _Pickled(path)
            opened: _Tensors = safe_open(path, framework="pt")
            return opened
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, f"{error}"[:200], "a file of tensors") from None
        except Exception as error:  # torch.load has no exception of its own for what it refuses
            raise _unreadable(path, f"{error}".splitlines()[0][:200], "a pickle of tensors only") from None


def _unreadable(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(str(path), found, expected, "give --load-dir a complete download")


def load_hf(directory: str | Path) -> Weights:
    """The model in a Hugging Face directory.

    Raises: CheckpointError for a model that we do not have, or tensors too few or too many
    """
    folder = HubFolder(directory)
    where = str(folder.path / "config.json")
    family = family_of(Fields(folder.config, where))
    stored = _under_full_names(folder, family)
    fields = Fields(folder.config, where, _is_untied(folder, family, stored))
    config = family.config(fields)
    rules = {rule.ours: rule for rule in family.rules(config)}
    _check_names(folder, family, stored, rules)

    def read(name: str) -> torch.Tensor:
        rule = rules[name]
        found = [folder.read(stored[theirs]) for theirs in rule.theirs]
        try:
            return rule.of_theirs(found)
        except RuntimeError:
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in zip(rule.theirs, found, strict=True))
            raise CheckpointError(str(folder.path), shapes, f"shapes that fit {where}") from None

    table = folder.read(stored[family.embedding])
    assert config.max_position_embeddings
    return Weights(
        config=config,
        vocab_size=len(table),
        max_positions=config.max_position_embeddings,
        seq_length=config.max_position_embeddings,
        decoder_seq_length=config.max_position_embeddings if family.of == "T5" else None,
        dtype=table.dtype,
        iteration=0,
        tokenizer=tokenizer_in(folder.path, len(table)),
        names=tuple(rules),
        read=read,
        home=family.name,
        decoder_start=fields.get("decoder_start_token_id") if family.of == "T5" else None,
    )


def _under_full_names(folder: HubFolder, family: Family) -> dict[str, str]:
    """Full name -> stored name: headless models leave their prefix out."""
    names = folder.names()
    if not family.base or any(name.startswith(family.base) for name in names):
        return {name: name for name in names}
    return {name if name == family.head else family.base + name: name for name in names}


def _is_untied(folder: HubFolder, family: Family, stored: Mapping[str, str]) -> bool:
    """Whether there is an output matrix of its own: what the config calls tied may differ from the embedding."""
    if not family.head or family.head not in stored:
        # T5 1.1's config says untied of any model; only its weights tell.
        return bool(family.head) and family.of != "T5" and folder.config.get("tie_word_embeddings") is False
    if folder.config.get("tie_word_embeddings") is False:
        return True
    if family.embedding not in stored:
        return False
    return not torch.equal(folder.read(stored[family.head]), folder.read(stored[family.embedding]))


def _check_names(folder: HubFolder, family: Family, stored: Mapping[str, str], rules: Mapping[str, Rule]) -> None:
    wanted = {theirs for rule in rules.values() for theirs in rule.theirs}
    missing = sorted(wanted - stored.keys())
    unknown = sorted(name for name in stored.keys() - wanted if not re.fullmatch(family.ignored, name))
    if missing or unknown:
        found = [f"{len(names)} {what}, such as {', '.join(names[:4])}" for what, names in
                 (("tensors missing", missing), ("tensors that it has no place for", unknown)) if names]  # fmt: skip
        kind = ", ".join(folder.config.get("architectures") or [family.key])
        raise CheckpointError(
            str(folder.path),
            f"{kind}: {'; '.join(found)}",
            f"the tensors of {family.name}, no more and no fewer",
            "a complete pretraining model of that class",
        )


def save_hf(weights: Weights, directory: Path) -> Family:
    """Write a model into an empty directory, without its tokenizer; returns the family that it became.

    Raises: CheckpointError for a model that no class of Hugging Face computes
    """
    weights = folded(weights)
    family = find_home(weights)
    _write_tensors(weights, family.rules(weights.config), directory)
    untied = weights.config.untie_embeddings_and_output_weights
    dtype = str(weights.dtype).removeprefix("torch.")
    config = {
        "architectures": [family.name],
        "model_type": family.key,
        **family.fields(weights.config, weights.max_positions),
        "vocab_size": weights.vocab_size,
        "tie_word_embeddings": not untied,
        "dtype": dtype,
        "torch_dtype": dtype,
        **special_ids(weights, family.of),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in directory.glob("*.safetensors"):
        shutil.copymode(directory / "config.json", path)  # the library's own mode is for nobody but the owner
    return family


def _write_tensors(weights: Weights, rules: list[Rule], directory: Path) -> None:
    """One file, or several and their index."""
    names: list[list[str]] = []
    total = 0
    for number, shard in enumerate(_shards(weights, rules), start=1):
        total += sum(_bytes_of(tensor) for tensor in shard.values())
        save_file(shard, directory / f"part-{number}", metadata={"format": "pt"})
        names.append(list(shard))
    if len(names) == 1:
        (directory / "part-1").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, held in enumerate(names, start=1):
        file = f"model-{number:05d}-of-{len(names):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(weights: Weights, rules: list[Rule]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    held = 0
    for rule in rules:
        for name, tensor in zip(rule.theirs, rule.to_theirs(weights.read(rule.ours)), strict=True):
            size = _bytes_of(tensor)
            if shard and held + size > SHARD_BYTES:
                yield shard
                shard, held = {}, 0
            # A copy of its own: safetensors takes no two views of one storage.
            shard[name] = tensor.clone(memory_format=torch.contiguous_format)
            held += size
    yield shard


def _bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
