"""Flags from dataclasses: one frozen dataclass per concern, one line per flag.

    @dataclass(frozen=True, kw_only=True)
    class OptimizerConfig:
        '''Optimizer.'''                                  # title of the group in --help
        lr: float | None = arg(None, "Peak learning rate.")
        clip_grad: float = arg(1.0, "Global L2 norm limit; 0 disables.")
        bias: bool = arg(True, "Leave out all biases.", "--disable-bias-linear")

`arg(default, help, *flags)` is `dataclasses.field` with metadata. Without explicit flags the field's name is the flag.
A bool that defaults to True is switched off by its flag (`--no-NAME` unless flags are given); one that defaults to
False is switched on. `Literal` gives choices, `tuple[X, ...]` gives a list of values, `X | None` may stay unset.
Underscores and dashes in option names are the same thing, as users of both Megatron and DeepSpeed spell them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeVar, Union

from megatron_ds.errors import ConfigError

C = TypeVar("C")


def arg(
    default: Any,
    help: str,
    *flags: str,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag; `flags` replace the name derived from the field.

    The first flag is the one shown in messages, the others are older spellings of the same thing.
    """
    metadata = {"help": help, "flags": flags, "parse": parse, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """One command-line flag, read off a dataclass field."""

    field: str
    names: tuple[str, ...]
    default: Any
    help: str
    options: Mapping[str, Any]
    """Keyword arguments for `ArgumentParser.add_argument`."""


@functools.cache
def flags_of(group: type) -> tuple[Flag, ...]:
    """All flags of one dataclass, in order of writing."""
    hints = typing.get_type_hints(group)
    fields = [field for field in dataclasses.fields(group) if "help" in field.metadata]
    return tuple(_flag(field, hints[field.name]) for field in fields)


def field_names(group: type) -> list[str]:
    """All fields of one dataclass; those without a flag are for recipes to set."""
    return [field.name for field in dataclasses.fields(group)]


def _flag(field: dataclasses.Field[Any], hint: Any) -> Flag:
    meta, name = field.metadata, field.name.replace("_", "-")
    inner = _without_none(hint)
    options: dict[str, Any]
    if inner is bool:
        names = meta["flags"] or ((f"--no-{name}",) if field.default is True else (f"--{name}",))
        options = {"action": "store_false" if field.default is True else "store_true"}
    else:
        names = meta["flags"] or (f"--{name}",)
        options = {**_value_options(inner, meta["parse"]), "metavar": meta["metavar"]}
    return Flag(field.name, tuple(names), field.default, meta["help"], options)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        kept = [a for a in typing.get_args(hint) if a is not type(None)]
        return kept[0] if len(kept) == 1 else Union[tuple(kept)]  # noqa: UP007
    return hint


def _value_options(hint: Any, parse: Callable[[str], Any] | None) -> dict[str, Any]:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        kind = type(choices[0])
        by_lower = {str(c).lower(): c for c in choices}
        return {"type": (lambda text: by_lower.get(text.lower(), text)) if kind is str else whole, "choices": choices}
    if typing.get_origin(hint) is tuple:
        return {**_value_options(typing.get_args(hint)[0], parse), "nargs": "*"}
    return {"type": parse or (whole if hint is int else hint)}


def whole(text: str) -> int:
    """A whole number in any spelling that scripts use: 8, 220_000_000, 1.0, 5e8.

    Raises: argparse.ArgumentTypeError for anything else
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}")
    return int(number)


class Parser(argparse.ArgumentParser):
    """argparse that treats `_` and `-` alike, never abbreviates, and raises ConfigError with the nearest name."""

    def __init__(self, prog: str | None = None, description: str | None = None):
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter, add_help=True
        )
        self.hints: dict[str, str] = {}
        """Flags that we know of but do not have, and what to say of each."""

    def add_config(self, group: type) -> None:
        """Add one dataclass as one group of the help page."""
        title = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
        section = self.add_argument_group(title)
        for flag in flags_of(group):
            section.add_argument(
                *flag.names,
                dest=f"{group.__name__}.{flag.field}",
                default=argparse.SUPPRESS,
                help=_help(flag),
                **flag.options,
            )

    def parse_configs(self, groups: Sequence[type[C]], argv: Sequence[str], defaults: Mapping[str, Any]) -> list[C]:
        """One frozen instance per dataclass. What was typed wins over `defaults`, which win over the fields' own.

        Raises: ConfigError for an unknown flag, a flag without its value, a value of the wrong kind
        """
        return self.build(groups, self.read(argv), defaults)

    def read(self, argv: Sequence[str]) -> dict[str, Any]:
        """What was typed, under 'Group.field'.

        Raises: ConfigError for an unknown flag, a flag without its value, a value of the wrong kind
        """
        namespace, unknown = self.parse_known_args(self._normalise(argv))
        if unknown:
            raise self._unknown(unknown[0])
        return vars(namespace)

    def build(self, groups: Sequence[type[C]], typed: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[C]:
        """One frozen instance per dataclass from what `read` found and `defaults`."""
        self._reject_unknown_defaults(groups, defaults)
        result = []
        for group in groups:
            prefix = f"{group.__name__}."
            values = {name: defaults[name] for name in field_names(group) if name in defaults}
            values |= {key[len(prefix) :]: value for key, value in typed.items() if key.startswith(prefix)}
            values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
            result.append(group(**values))
        return result

    def _reject_unknown_defaults(self, groups: Sequence[type], defaults: Mapping[str, Any]) -> None:
        fields = {name for group in groups for name in field_names(group)}
        for name in defaults:
            if name not in fields:
                raise ConfigError(f"args_defaults[{name!r}]", found=name, expected="the name of a config field")

    def _normalise(self, argv: Sequence[str]) -> list[str]:
        """`--deepspeed_config=x` -> `--deepspeed-config=x`; values are left alone."""
        by_dashes = {name.replace("_", "-"): name for name in self._option_string_actions}
        out = []
        for word in argv:
            name, equals, value = word.partition("=")
            if name.startswith("--") and name not in self._option_string_actions:
                name = by_dashes.get(name.replace("_", "-"), name)
            out.append(name + equals + value)
        return out

    def _unknown(self, word: str) -> ConfigError:
        name = word.split("=")[0].replace("_", "-")
        if name in self.hints:
            return ConfigError(name, found="a flag that this version does not have", fix=self.hints[name])
        if not name.startswith("-"):
            return ConfigError(
                f"argument {word!r}", found="a value that no flag takes", expected="--flag value pairs only"
            )
        near = difflib.get_close_matches(name, self._option_string_actions, n=3, cutoff=0.6)
        fix = f"did you mean {' or '.join(near)}?" if near else "see --help for every flag"
        return ConfigError(name, found="a flag that nobody reads", expected="a flag listed by --help", fix=fix)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own hook for choices; ours says which of them is the nearest."""
        choices = list(action.choices or ())
        if not choices or value in choices:
            return
        if isinstance(value, str):
            by_lower = {str(choice).lower(): choice for choice in choices}
            near = [by_lower[name] for name in difflib.get_close_matches(value.lower(), by_lower, n=1)]
        else:
            near = [min(choices, key=lambda choice: abs(choice - value))]
        flag = action.option_strings[0]
        fix = f"{flag} {near[0]}" if near else "see --help"
        raise ConfigError(flag, f"invalid choice: {value!r}", f"one of {', '.join(map(str, choices))}", fix)

    def error(self, message: str) -> NoReturn:
        subject, _, rest = message.partition(": ")
        if subject.startswith("argument ") and rest:
            raise ConfigError(subject.removeprefix("argument ").split("/")[0], found=rest, fix="see --help")
        raise ConfigError("command line", found=message, fix="see --help")

    def print_help(self, file: Any = None) -> None:
        super().print_help(file or sys.stdout)


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)

    def _format_usage(self, usage: Any, actions: Iterable[Any], groups: Any, prefix: Any) -> str:
        return f"usage: {usage or f'{self._prog} [flags]'}\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = ", ".join(action.option_strings)
        if action.nargs == 0:
            return names
        value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "X")
        return f"{names} {value}{' ...' if action.nargs == '*' else ''}"


def _help(flag: Flag) -> str:
    default = " ".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
    shown = "" if isinstance(flag.default, bool) or default in (None, "") else f" Default: {default}."
    return (flag.help + shown).replace("%", "%%")
