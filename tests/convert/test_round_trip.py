"""Every class of transformers in and out again: the same logits, the same tensors to the byte, under the same names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ds.checkpoint.load import find
from megatron_ds.checkpoint.save import save
from megatron_ds.convert import hub, proof
from megatron_ds.convert.hub import load_hf, save_hf
from megatron_ds.convert.native import load_native, save_native
from megatron_ds.errors import CheckpointError
from megatron_ds.parallel.context import Axis
from megatron_ds.parallel.spec import Box, Piece
from tests.convert import published
from tools import convert_checkpoint


def convert(kind: str, loader: str, saver: str, source: Path, target: Path, *more: str) -> int:
    where = ["--load-dir", str(source), "--save-dir", str(target)]
    return convert_checkpoint.main(["--model-type", kind, "--loader", loader, "--saver", saver, *where, *more])


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_bytes(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", published.MODELS)
def test_in_and_out(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, kind = published.save(name, tmp_path), published.kind(name)
    assert convert(kind, "hf", "megatron_ds", source, tmp_path / "ours", "--no-check") == 0
    assert convert(kind, "megatron_ds", "hf", tmp_path / "ours", tmp_path / "theirs") == 0
    # The proof of the way out covers the way in too: the same bytes came out.
    assert_same_bytes(tensors(tmp_path / "theirs"), tensors(source))
    assert f"transformers' {published.class_name(name)} in fp32: " in capsys.readouterr().out
    assert json.loads((tmp_path / "theirs/config.json").read_text())["architectures"] == [published.class_name(name)]


def test_the_way_in_is_proved_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = published.save("qwen3", tmp_path)
    assert convert("GPT", "hf", "megatron_ds", source, tmp_path / "ours") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("largest logit difference from transformers' Qwen3ForCausalLM in fp32: ")
    assert 0 < float(line.split()[-1]) < 1e-4
    assert find(tmp_path / "ours").iteration == 0


def test_t5_with_a_head_of_its_own(tmp_path: Path) -> None:
    """As T5 1.1 was published: its config in transformers 5 ties, its file holds another matrix."""
    source = published.save("t5-1.1-tied", tmp_path)
    found = load_file(source / "model.safetensors")
    head = torch.randn(found["shared.weight"].shape, generator=torch.Generator().manual_seed(1))
    save_file(found | {"lm_head.weight": head}, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["scale_decoder_outputs"]
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert convert("T5", "hf", "megatron_ds", source, tmp_path / "ours", "--no-check") == 0
    assert convert("T5", "megatron_ds", "hf", tmp_path / "ours", tmp_path / "theirs") == 0
    assert_same_bytes(tensors(tmp_path / "theirs"), tensors(source))
    weights = load_native(tmp_path / "ours")
    assert weights.config.untie_embeddings_and_output_weights and not weights.config.scale_decoder_outputs
    assert json.loads((tmp_path / "theirs/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_is_kept_and_files_may_be_many(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.build("llama").to(dtype).save_pretrained(tmp_path / "llama", max_shard_size="9KB")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
    monkeypatch.setattr(hub, "SHARD_BYTES", 12_000)
    assert convert("GPT", "hf", "megatron_ds", tmp_path / "llama", tmp_path / "ours", "--no-check") == 0
    assert convert("GPT", "megatron_ds", "hf", tmp_path / "ours", tmp_path / "theirs") == 0
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_bytes(tensors(tmp_path / "theirs"), tensors(tmp_path / "llama"))
    assert json.loads((tmp_path / "theirs/config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_boxes_of_any_ranks_give_the_same_export(tmp_path: Path) -> None:
    """As tensor-parallel ranks cut them, in halves by rows; an optimizer's masters lie beside them."""
    weights = load_hf(published.save("gpt2", tmp_path))
    save_native(weights, tmp_path / "whole")
    pieces = []
    for name in weights.names:
        tensor = weights.read(name)
        rows, rest = tensor.shape[0] // 2, tuple(tensor.shape[1:])
        for start, part in ((0, tensor[:rows]), (rows, tensor[rows:])):
            box = Box((start, *(0 for _ in rest)), tuple(part.shape))
            pieces.append(Piece(f"model/{name}", tuple(tensor.shape), box, part))
        whole = Box((0,) * tensor.dim(), tuple(tensor.shape))
        pieces.append(Piece(f"optimizer/{name}/master", tuple(tensor.shape), whole, torch.zeros_like(tensor)))
    state = find(tmp_path / "whole").index.state
    save(tmp_path / "cut", 7, pieces, state, Axis.solo("world"))
    (tmp_path / "out").mkdir()
    save_hf(load_native(tmp_path / "cut"), tmp_path / "out")
    assert_same_bytes(tensors(tmp_path / "out"), tensors(tmp_path / "gpt2"))


def test_only_the_tensors_of_the_model_are_saved(tmp_path: Path) -> None:
    weights = load_hf(published.save("bloom", tmp_path))
    lacking = dataclasses.replace(weights, names=weights.names[1:])
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight"):
        save_native(lacking, tmp_path / "ours")
    misshapen = dataclasses.replace(weights, read=lambda name: weights.read(name)[..., :1])
    with pytest.raises(CheckpointError, match=r"embedding\.word_embeddings\.weight"):
        save_native(misshapen, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_prompts_are_fixed_and_fit_the_model() -> None:
    first, again = (proof.prompts("BERT", 53, 45) for _ in range(2))
    assert len(first) == 4 and len({prompt["input_ids"].shape for prompt in first}) == 4
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert a["input_ids"].shape[1] <= 45 and int(a["input_ids"].max()) < 53
    assert any(bool(prompt["token_type_ids"].any()) for prompt in first)
