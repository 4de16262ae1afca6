"""A tokenizer's files: found in a Hugging Face directory, kept beside a checkpoint, written out again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ds import log
from megatron_ds.convert.sentencepiece_json import as_tokenizer_json
from megatron_ds.convert.weights import Weights
from megatron_ds.data.config import TokenizerConfig
from megatron_ds.data.tokenizer import Tokenizer, build_tokenizer
from megatron_ds.errors import UserError
from megatron_ds.model.config import ModelType

FOLDER = "tokenizer"
"""Where a checkpoint of ours keeps them, beside its iterations."""

_KEPT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_WORD_PIECES = ("BertWordPieceLowerCase", "BertWordPieceCase")


def tokenizer_in(folder: Path, vocab_size: int) -> TokenizerConfig | None:
    """What our tokenizer flags would be for the files of a Hugging Face directory; None if there are none.

    Where the model has more rows than the tokenizer has tokens, the rest get names of extra ids.
    """
    config = _described(folder)
    if config is None or config.tokenizer_type in _WORD_PIECES:  # those become a tokenizer.json first, see keep()
        return config
    try:
        tokenizer = build_tokenizer(config)
        rest = vocab_size - tokenizer.vocab_size
        if rest < 0:
            log.warn(f"the tokenizer in {folder} has {tokenizer.vocab_size} ids, the model {vocab_size} rows")
        elif rest:
            config = dataclasses.replace(config, vocab_extra_ids=len(tokenizer.sentinels) + rest)
    except UserError as error:
        log.warn(f"without a tokenizer: {error.subject}: {error.found}")
        return None
    return config


def _described(folder: Path) -> TokenizerConfig | None:
    def there(name: str) -> bool:
        return (folder / name).is_file()

    if there("tokenizer.json"):
        return TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(folder))
    if there("vocab.json") and there("merges.txt"):
        vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        return TokenizerConfig(tokenizer_type="GPT2BPETokenizer", vocab_file=vocab, merge_file=merges)
    if there("vocab.txt"):
        lower = _json(folder / "tokenizer_config.json").get("do_lower_case", True)
        return TokenizerConfig(tokenizer_type=_WORD_PIECES[0 if lower else 1], vocab_file=str(folder / "vocab.txt"))
    for name, kind in (("tokenizer.model", "Llama2Tokenizer"), ("spiece.model", "GPTSentencePieceTokenizer")):
        if there(name):
            return TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(folder / name))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(weights: Weights, directory: Path, final: Path) -> Weights:
    """Copy the files into `directory`/tokenizer; what is returned names them where they will lie, under `final`."""
    config = weights.tokenizer
    if config is None or not _files(config):
        return weights
    target, named = directory / FOLDER, final / FOLDER
    _copy(config, target)
    if config.tokenizer_type in _WORD_PIECES:
        tokens = _lines(target / "vocab.txt")
        if len(tokens) == weights.vocab_size:  # our own type would add two
            _write_word_piece(config, tokens, target)
            moved = TokenizerConfig(tokenizer_type="HFTokenizer", tokenizer_model=str(named))
            return dataclasses.replace(weights, tokenizer=moved)
    paths: dict[str, Any] = {name: str(named / file.name) for name, file in _renamed(config).items()}
    if config.tokenizer_model and _files(config)["tokenizer_model"].name == "tokenizer.json":
        paths["tokenizer_model"] = str(named)
    return dataclasses.replace(weights, tokenizer=dataclasses.replace(config, **paths))


def write_out(weights: Weights, directory: Path) -> None:
    """Write the files into a Hugging Face directory, such that AutoTokenizer reads them."""
    config = weights.tokenizer
    if config is None or config.tokenizer_type == "NullTokenizer":
        return
    try:
        tokenizer = build_tokenizer(config)
    except UserError as error:
        log.warn(f"the export has no tokenizer: {error.subject}: {error.found}")
        return
    _copy(config, directory)
    if config.tokenizer_type in _WORD_PIECES:
        tokens = _lines(directory / "vocab.txt")
        tokens += _added(tokenizer, len(tokens))
        _write_word_piece(config, tokens, directory)
        (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    elif config.tokenizer_type == "GPT2BPETokenizer" and not (directory / "tokenizer.json").exists():
        _write_gpt2(tokenizer, directory)
    elif not (directory / "tokenizer.json").exists():
        _write_sentencepiece(config, tokenizer, directory)
    else:
        _describe(directory, "PreTrainedTokenizerFast", eos_token=tokenizer.detokenize([tokenizer.eod]))


def special_ids(weights: Weights, of: ModelType) -> dict[str, Any]:
    """Ids that a config.json tells text generation: those that came with the model, else the tokenizer's."""
    defaults: dict[str, Any] = dict.fromkeys(_IDS[:2] if of == "GPT" else _IDS[2:3], None if of == "GPT" else 0)
    if of == "T5":
        start = 0 if weights.decoder_start is None else weights.decoder_start
        defaults |= {"eos_token_id": 1, "decoder_start_token_id": start}
    config = weights.tokenizer
    if config is None:
        return defaults
    files = _files(config)
    beside = _json(next(iter(files.values())).parent / "generation_config.json") if files else {}
    came_along = {name: beside[name] for name in _IDS if beside.get(name) is not None}
    if came_along:
        return {**defaults, **came_along}
    try:
        tokenizer = build_tokenizer(config)
    except UserError:
        return defaults
    if of != "BERT":
        defaults["eos_token_id"] = tokenizer.eod if of == "GPT" else _role(tokenizer, "eos", 1)
    if of == "T5" and weights.decoder_start is None:
        defaults["decoder_start_token_id"] = _role(tokenizer, "bos", 0)
    if of != "GPT":
        defaults["pad_token_id"] = _role(tokenizer, "pad", 0)
    return defaults


def _role(tokenizer: Tokenizer, role: str, default: int) -> int:
    try:
        return {"bos": lambda: tokenizer.bos, "eos": lambda: tokenizer.eos, "pad": lambda: tokenizer.pad}[role]()
    except UserError:
        return default


def _files(config: TokenizerConfig) -> dict[str, Path]:
    """Field -> file, as far as it is there."""
    fields = ("vocab_file", "merge_file", "tokenizer_model")
    given = {name: Path(vars(config)[name]) for name in fields if vars(config)[name]}
    files = {name: path / "tokenizer.json" if path.is_dir() else path for name, path in given.items()}
    return {name: path for name, path in files.items() if path.is_file()}


def _renamed(config: TokenizerConfig) -> dict[str, Path]:
    """Field -> the name that Hugging Face has for such a file."""
    names = {}
    for field, path in _files(config).items():
        plain = {"vocab_file": "vocab.txt" if config.tokenizer_type in _WORD_PIECES else "vocab.json",
                 "merge_file": "merges.txt", "tokenizer_model": f"tokenizer{path.suffix}"}  # fmt: skip
        names[field] = Path(path.name if path.name in _KEPT else plain[field])
    return names


def _copy(config: TokenizerConfig, target: Path) -> None:
    target.mkdir(exist_ok=True)
    files, names = _files(config), _renamed(config)
    whole = all(path.name in _KEPT for path in files.values())
    for folder in {path.parent for path in files.values()} if whole else ():
        for name in _KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
    for field, path in files.items():
        shutil.copyfile(path, target / names[field])


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _added(tokenizer: Tokenizer, own: int) -> list[str]:
    """Names of the ids that our tokenizer has beyond its files."""
    return [tokenizer.detokenize([token]) for token in range(own, tokenizer.vocab_size)]


def _write_word_piece(config: TokenizerConfig, tokens: Sequence[str], directory: Path) -> None:
    """tokenizer.json of a vocab.txt; a sample is [CLS] text [SEP], as BERT reads it."""
    from tokenizers import BertWordPieceTokenizer

    lower = config.tokenizer_type == _WORD_PIECES[0]
    library: Any = BertWordPieceTokenizer({token: i for i, token in enumerate(tokens)}, lowercase=lower)
    special = [token for token in tokens if token.startswith("[") and token.endswith("]") and token.isupper()]
    library.add_special_tokens([token for token in special if not token.startswith("[unused")])
    library.save(str(directory / "tokenizer.json"))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "cls", "sep", "mask", "pad", "bos", "eos")}
    named = {role: token for role, token in roles.items() if token in tokens}
    _describe(directory, "PreTrainedTokenizerFast", do_lower_case=lower, **named)


def _write_gpt2(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json of vocab.json and merges.txt."""
    from tokenizers import ByteLevelBPETokenizer

    library: Any = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    end = library.id_to_token(tokenizer.eod)
    library.add_special_tokens([end, *_added(tokenizer, library.get_vocab_size(with_added_tokens=False))])
    library.save(str(directory / "tokenizer.json"))
    _describe(directory, "PreTrainedTokenizerFast", bos_token=end, eos_token=end, unk_token=end)


def _write_sentencepiece(config: TokenizerConfig, tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json of a SentencePiece model, where it can be written as one."""
    from sentencepiece import SentencePieceProcessor

    path = _files(config)["tokenizer_model"]
    model: Any = SentencePieceProcessor(model_file=str(path))
    own = model.get_piece_size()
    with_bos = config.tokenizer_type == "Llama2Tokenizer"
    text = as_tokenizer_json(path, _added(tokenizer, own), begins_with_bos=with_bos)
    if text is None:
        log.warn(f"the export has no tokenizer.json: {path} is of a type that it cannot express")
        return
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    ids = {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
    named = {f"{role}_token": model.id_to_piece(token) for role, token in ids.items() if token >= 0}
    _describe(directory, "PreTrainedTokenizerFast", **named)


def _describe(directory: Path, kind: str, **facts: Any) -> None:
    """tokenizer_config.json, unless one came along."""
    path = directory / "tokenizer_config.json"
    if not path.exists():
        facts = {"tokenizer_class": kind, "clean_up_tokenization_spaces": False, **facts}
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
