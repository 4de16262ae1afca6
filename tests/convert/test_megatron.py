from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ds.convert.megatron import load_megatron
from megatron_ds.errors import CheckpointError
from tests.convert.megatron_files import (
    HEADS,
    PADDED,
    POSITIONS,
    VOCAB,
    D,
    F,
    H,
    Whole,
    gpt,
    gpt_chunk,
    is_whole,
    options,
    t5,
    t5_chunk,
    write_classic,
)


def _classic_gpt(directory: Path, whole: Whole, args: argparse.Namespace, tp: int = 2, pp: int = 2) -> Path:
    per = 4 // pp
    return write_classic(
        directory, args, lambda t, p: {"model": gpt_chunk(whole, range(p * per, p * per + per), t, tp)}, tp, pp
    )


def test_gpt_with_groups_and_gates_cut_over_tensor_and_pipeline_ranks(tmp_path: Path) -> None:
    whole = gpt(groups=2, gated=True, bias=False, norm_bias=False, learned=False, untied=True)
    args = options(
        pipeline_model_parallel_size=2,
        group_query_attention=True,
        num_query_groups=2,
        swiglu=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        norm_epsilon=1e-6,
        position_embedding_type="rope",
        rotary_percent=0.5,
        rotary_base=5000,
        untie_embeddings_and_output_weights=True,
        window_size=(4, 0),
    )
    _classic_gpt(tmp_path, whole, args)
    weights = load_megatron(str(tmp_path), "GPT", VOCAB)
    is_whole(weights, whole)
    config = weights.config
    assert (config.num_layers, config.hidden_size, config.ffn_size, config.head_size) == (4, H, F, D)
    assert (config.num_attention_heads, config.kv_heads, config.activation) == (HEADS, 2, "swiglu")
    assert (config.normalization, config.norm_epsilon, config.positions) == ("RMSNorm", 1e-6, "rope")
    assert (config.rotary_percent, config.rotary_base, config.window_size) == (0.5, 5000.0, 4)
    assert config.untie_embeddings_and_output_weights
    assert not config.add_bias_linear
    assert (weights.vocab_size, weights.max_positions, weights.seq_length) == (VOCAB, POSITIONS, POSITIONS)
    assert (weights.iteration, weights.dtype, weights.tokenizer) == (100, torch.float32, None)


@pytest.mark.parametrize(
    ("version", "order"), [(None, "part"), (0, "part"), (1.0, "last"), (2.0, "group"), (3.0, "group")]
)
def test_rows_of_every_version_and_the_oldest_names(tmp_path: Path, version: float | None, order: str) -> None:
    whole = gpt(order=order)
    args = options(openai_gelu=True)
    del args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    args.model_parallel_size = 2

    def state(t: int, p: int) -> dict[str, Any]:
        return {"model": gpt_chunk(whole, range(4), t, 2, stack="transformer", attention="attention")}

    path = write_classic(tmp_path, args, state, 2, 1, version)
    is_whole(load_megatron(str(path), "GPT", VOCAB), whole)


def test_without_a_vocabulary_size_the_padding_stays_and_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gpt()
    _classic_gpt(tmp_path, whole, options(tensor_model_parallel_size=1), tp=1, pp=1)
    weights = load_megatron(str(tmp_path), "GPT", None)
    words = weights.read("embedding.word_embeddings.weight")
    assert (weights.vocab_size, words.shape[0]) == (PADDED, PADDED)
    assert torch.equal(words[:VOCAB], whole.tensors["embedding.word_embeddings.weight"])
    assert "--true-vocab-size" in capsys.readouterr().err


def test_virtual_stages(tmp_path: Path) -> None:
    """Chunk c of stage p is virtual stage 2c + p: layers 0 and 2 live on stage 0."""
    whole = gpt(untied=True)

    def state(t: int, p: int) -> dict[str, Any]:
        return {f"model{c}": gpt_chunk(whole, range(2 * c + p, 2 * c + p + 1), t, 2) for c in range(2)}

    args = options(pipeline_model_parallel_size=2, untie_embeddings_and_output_weights=True)
    write_classic(tmp_path, args, state, 2, 2)
    is_whole(load_megatron(str(tmp_path), "GPT", VOCAB), whole)


@pytest.mark.parametrize(("binary_head", "fused"), [(True, False), (False, True)])
def test_bert(tmp_path: Path, binary_head: bool, fused: bool) -> None:
    """The fused MLP has the tanh GELU, the head beside it erf."""
    whole = gpt()
    whole.linear("lm_head.dense", H, H)
    whole.norm("lm_head.norm")
    whole.add("lm_head.bias", VOCAB)
    if binary_head:
        whole.add("embedding.tokentype_embeddings.weight", 2, H)
        whole.linear("pooler", H, H)
        whole.linear("binary_head", 2, H)

    def state(t: int, p: int) -> dict[str, Any]:
        model = gpt_chunk(whole, range(2 * p, 2 * p + 2), t, 2)
        if p == 1:
            model["lm_head"] = {"bias": whole.piece("lm_head.bias", t, 2)}
            model["lm_head"] |= whole.pair("lm_head.dense", "dense.") | whole.pair("lm_head.norm", "layernorm.")
            if binary_head:
                model["language_model"]["pooler"] = whole.pair("pooler", "dense.")
                model["binary_head"] = whole.pair("binary_head")
        return {"model": model}

    args = options(
        pipeline_model_parallel_size=2,
        bert_binary_head=binary_head,
        bias_gelu_fusion=fused,
        apply_residual_connection_post_layernorm=True,
        layernorm_epsilon=1e-12,
    )
    write_classic(tmp_path, args, state, 2, 2)
    weights = load_megatron(str(tmp_path), "BERT", VOCAB)
    is_whole(weights, whole)
    assert weights.config.bert_binary_head == binary_head
    assert weights.config.apply_residual_connection_post_layernorm
    assert weights.config.norm_epsilon == 1e-12
    assert weights.config.activation == ("gelu_tanh" if fused else "gelu")
    assert not weights.config.openai_gelu


@pytest.mark.parametrize(("version", "order"), [(0, "part"), (1.0, "last"), (3.0, "group")])
def test_t5_with_its_stacks_on_stages_of_their_own(tmp_path: Path, version: float, order: str) -> None:
    """Encoder of 2 layers on stage 0; decoder of 3 on stages 1 and 2, the first of which has the tables once more."""
    whole = t5(order=order, kv_order=order)

    def state(t: int, p: int) -> dict[str, Any]:
        return {"model": t5_chunk(whole, t, encoder=p == 0, decoder=(range(0), range(2), range(2, 3))[p])}

    args = options(
        num_layers=2,
        encoder_num_layers=2,
        decoder_num_layers=3,
        pipeline_model_parallel_size=3,
        decoder_seq_length=5,
        position_embedding_type="learned_absolute",
    )
    write_classic(tmp_path, args, state, 2, 3, version)
    weights = load_megatron(str(tmp_path), "T5", VOCAB)
    is_whole(weights, whole)
    assert (weights.config.encoder_layers, weights.config.decoder_layers) == (2, 3)
    assert (weights.seq_length, weights.decoder_seq_length) == (POSITIONS, 5)


def test_names_of_megatron_core(tmp_path: Path) -> None:
    """Flat names, norms within the matrix that follows, empty states of fp8 kernels."""
    whole = gpt(groups=2, gated=True, untied=True)
    norms = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }

    def state(t: int, p: int) -> dict[str, Any]:
        model: dict[str, Any] = {}
        for name in whole.tensors:
            theirs = f"decoder.{name}" if name.startswith(("layers.", "final")) else name
            for ours, fused in norms.items():
                theirs = theirs.replace(ours, fused)
            model[theirs] = whole.piece(name, t, 2)
            model[f"{theirs.rsplit('.', 1)[0]}._extra_state"] = None
        return {"model": model}

    args = options(
        swiglu=True, num_query_groups=2, group_query_attention=True, untie_embeddings_and_output_weights=True
    )
    write_classic(tmp_path, args, state, 2, 1)
    is_whole(load_megatron(str(tmp_path), "GPT", VOCAB), whole)


def test_a_tied_head_that_was_stored_all_the_same(tmp_path: Path) -> None:
    """Megatron-Core keeps it on a last stage of its own."""
    whole = gpt()

    def state(t: int, p: int) -> dict[str, Any]:
        model = gpt_chunk(whole, range(2 * p, 2 * p + 2), t, 2)
        words = model.pop("word_embeddings_for_head", None)
        return {"model": model | ({"output_layer.weight": words["weight"]} if words else {})}

    write_classic(tmp_path, options(pipeline_model_parallel_size=2), state, 2, 2)
    is_whole(load_megatron(str(tmp_path), "GPT", VOCAB), whole)


def test_bigscience_gates_the_second_half(tmp_path: Path) -> None:
    """x1 * activation(x2): what the file has first is what we have second."""
    whole = gpt(gated=True)
    stored = Whole(dict(whole.tensors), gated=True)
    for name, tensor in whole.tensors.items():
        if "linear_fc1" in name:
            stored.tensors[name] = torch.cat([tensor[F:], tensor[:F]])
    _classic_gpt(tmp_path, stored, options(glu_activation="geglu"), pp=1)
    weights = load_megatron(str(tmp_path), "GPT", VOCAB)
    is_whole(weights, whole)
    assert weights.config.activation == "geglu"


def test_a_release_and_its_tokenizer(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_text("{}")
    args = options(vocab_file=str(vocab), merge_file=str(vocab), vocab_extra_ids=3, tensor_model_parallel_size=1)
    _classic_gpt(tmp_path, gpt(), args, tp=1, pp=1).rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    tokenizer = load_megatron(str(tmp_path), "GPT", VOCAB).tokenizer
    assert tokenizer is not None
    assert (tokenizer.tokenizer_type, tokenizer.vocab_file) == ("GPT2BPETokenizer", str(vocab))
    assert (tokenizer.merge_file, tokenizer.vocab_extra_ids) == (str(vocab), 3)


def test_copies_that_drifted_apart_are_averaged(tmp_path: Path) -> None:
    whole = gpt()
    path = _classic_gpt(tmp_path, whole, options(), pp=1)
    file = path / "mp_rank_01" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["language_model"]["encoder"]["final_layernorm.weight"] += 2.0
    torch.save(state, file)
    read = load_megatron(str(tmp_path), "GPT", VOCAB).read("final_layernorm.weight")
    torch.testing.assert_close(read, whole.tensors["final_layernorm.weight"] + 1.0)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    whole = gpt()
    path = _classic_gpt(tmp_path, whole, options(pipeline_model_parallel_size=2))
    file = path / "mp_rank_01_001" / "model_optim_rng.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001.*\n.*damaged"):
        load_megatron(str(tmp_path), "GPT", VOCAB)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_001/model_optim_rng.pt\n.*no such file"):
        load_megatron(str(tmp_path), "GPT", VOCAB)
    for name in ("mp_rank_00_001", "mp_rank_01_000"):
        (path / name / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="no such file, nor 2 more"):
        load_megatron(str(tmp_path), "GPT", VOCAB)
    (path / "mp_rank_00_000" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no mp_rank_00/model_optim_rng\.pt"):
        load_megatron(str(tmp_path), "GPT", VOCAB)


def _broken_state(kind: str, state: dict[str, Any]) -> None:
    language = state["model"]["language_model"]
    if kind == "a parameter less":
        del language["encoder"]["layers.2.mlp.dense_4h_to_h.bias"]
    elif kind == "a shape":
        language["encoder"]["layers.1.mlp.dense_h_to_4h.weight"] = torch.zeros(F, H + 1)
    elif kind == "a name":
        language["encoder"]["layers.1.mlp.router.weight"] = torch.zeros(2)
    elif kind == "options":
        del state["args"]
    elif kind == "a version":
        state["checkpoint_version"] = 17
    elif kind == "a type":
        state["args"].hidden_size = "12"
    elif kind == "experts":
        state["args"].num_experts = [4]
    else:
        state["args"].num_layers = 5


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("a parameter less", r"lacks layers\.2\.mlp\.linear_fc2\.bias"),
        ("a shape", r"layers\.1\.mlp\.linear_fc1\.weight in pieces \[10, 13\]"),
        ("a name", r"layers\.1\.mlp\.router\.weight"),
        ("options", r"no options"),
        ("a version", r"checkpoint_version\n.*17"),
        ("a type", r"hidden_size\n.*'12'"),
        ("experts", r"num_experts\n.*\[4\]"),
        ("too few layers", r"lacks layers\.4"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, kind: str, said: str) -> None:
    args = options(tensor_model_parallel_size=1)
    file = _classic_gpt(tmp_path, gpt(), args, tp=1, pp=1) / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    _broken_state(kind, state)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=said):
        load_megatron(str(tmp_path), "GPT", VOCAB)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_disagree(tmp_path: Path, rank: int) -> None:
    file = _classic_gpt(tmp_path, gpt(), options(), pp=1) / f"mp_rank_0{rank}" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    _broken_state("a parameter less", state)
    torch.save(state, file)
    with pytest.raises(CheckpointError, match=r"only some ranks .* have: layers\.2\.mlp\.linear_fc2\.bias"):
        load_megatron(str(tmp_path), "GPT", VOCAB)


def test_another_model_type_or_vocabulary(tmp_path: Path) -> None:
    _classic_gpt(tmp_path, gpt(), options(tensor_model_parallel_size=1), tp=1, pp=1)
    with pytest.raises(CheckpointError, match="lacks binary_head"):
        load_megatron(str(tmp_path), "BERT", VOCAB)
    with pytest.raises(CheckpointError, match="lacks decoder"):
        load_megatron(str(tmp_path), "T5", VOCAB)
    with pytest.raises(CheckpointError, match="--true-vocab-size 17"):
        load_megatron(str(tmp_path), "GPT", PADDED + 1)


def test_directories_that_hold_something_else(tmp_path: Path) -> None:
    def refused(directory: Path, said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            load_megatron(str(directory), "GPT", VOCAB)

    refused(tmp_path / "absent", "no such directory")
    refused(tmp_path, "no checkpoint of Megatron")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    refused(tmp_path, "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../elsewhere")
    refused(tmp_path, "elsewhere")
    new = tmp_path / "iter_0000005"
    new.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    (new / "__0_0.distcp").touch()
    refused(tmp_path, "torch_dist")
    (new / "__0_0.distcp").rename(new / "index.json")
    refused(tmp_path, "--loader megatron_ds")
    (new / "index.json").rename(new / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    refused(tmp_path, "ZeRO-3")
