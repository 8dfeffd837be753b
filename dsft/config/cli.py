"""The command line: arguments as Hydra should read them, and which settings they give.

Hydra reads `name=2024_11_25` as a number. Whether a value is text is known from the schema, so what Hydra would read
differently from how it is written is put in quotes first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from dsft.config.schema import is_text, is_text_list, is_text_map, is_text_or_null, knobs
from dsft.errors import UserError

_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", re.DOTALL)
_ESCAPED = re.compile(r"\\([,=: ])")
_CHOICE = re.compile(r"choice\((.*)\)", re.DOTALL)
_RANGE = re.compile(r"range\([^()]*\)")
_OPTIONS = "--config-path -cp --config-name -cn --config-dir -cd --package -p --cfg -c --experimental-rerun".split()
"""Hydra's options that are followed by a value of theirs, which is no setting even where it holds a `=`."""
_OPEN, _CLOSE = "([{", ")]}"


def split_launcher_args(argv: list[str]) -> list[str]:
    """Arguments without the `--local_rank=N` or `--local-rank N` that launchers add and Hydra refuses."""
    kept, rest = [], iter(argv)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(argument)
        elif not equals:
            next(rest, None)
    return kept


def quote_text(argv: list[str]) -> list[str]:
    """Arguments in which the value of every text setting is what is written, whatever it looks like.

    A value is taken as it stands: `name=1e5`, `name=007`, `name=yes`, `name=试验 (1)`, `data.train=a=b.jsonl`. Quotes
    around a whole value are taken off; `\\,`, `\\=`, `\\:` and `\\ ` are Hydra's way to write the character alone;
    `${...}` is an interpolation; a comma outside of brackets separates the values of a sweep, for which
    `choice(...)` and `range(...)` may stand too; `null` is null where the setting may be null. The elements of lists
    are read in the same way.
    """
    return [argument if before in _OPTIONS else _argument(argument) for before, argument in zip(["", *argv], argv)]


def given() -> frozenset[str] | None:
    """The settings that the command line gave, and the groups that it chose; None outside of a Hydra command."""
    return names(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None


def names(arguments: Iterable[str]) -> frozenset[str]:
    """The settings that arguments in Hydra's grammar give, and the groups that they choose."""
    overrides = _parser().parse_overrides(list(arguments))
    return frozenset(name for o in overrides if not o.is_delete() for name in _leaves(o.key_or_group, o.value()))


def read(arguments: Iterable[str], known: Collection[str]) -> dict[str, Any]:
    """Values by name, of a command that composes no config; written as they are for one that does.

    Args:
        arguments: `key=value`, in Hydra's grammar.
        known: Names that there are.

    Raises:
        UserError: An argument is no `key=value`, one of Hydra's others (`+key=`, `~key`, a sweep), or of no known name.
    """
    found: dict[str, Any] = {}
    for argument in arguments:
        try:
            (override,) = _parser().parse_overrides(quote_text([argument]))
        except HydraException:
            override = None
        plain = override and not (override.is_add() or override.is_delete() or override.is_sweep_override())
        if override is None or not plain or override.key_or_group not in known:
            near = difflib.get_close_matches(argument.partition("=")[0].lstrip("-+~"), known, n=1, cutoff=0.0)
            raise UserError(f"{argument!r} is no key=value of {', '.join(known)}. Nearest: {near[0]}=...")
        found[override.key_or_group] = override.value()
    return found


def quoted(name: str, value: str) -> str:
    """`value` of the setting or group called `name`, in Hydra's grammar."""
    if is_text(knobs().get(name)) or is_text_list(knobs().get(name)):
        # Hydra forgets the quotes of a function's arguments, and the same sweep can be written without one
        value = _CHOICE.sub(r"\1", value) if _CHOICE.fullmatch(value) else value
    parts = _split(value)
    if len(parts) > 1:  # of a sweep
        return ",".join(_element(name, part.strip()) for part in parts)
    return value if _RANGE.fullmatch(value) else _element(name, value)


def _argument(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.startswith(("-", "~", "hydra.")) or not value:
        return argument
    name = key.lstrip("+")
    if is_text_map(knobs().get(_setting(name))):
        key = f"++{name}"  # Hydra knows the names in it only then
    return f"{key}={quoted(name, value)}"


def _setting(name: str) -> str:
    """The setting that `name` is one text of, where that holds texts by names; else `name` itself."""
    section = name.rpartition(".")[0]
    return section if is_text_map(knobs().get(section)) else name


def _element(name: str, value: str) -> str:
    """One value: not of a sweep any more."""
    if value[:1] == "{" and value[-1:] == "}" and any(knob.startswith(f"{name}.") for knob in knobs()):
        pairs = [_split(item, ":") for item in _split(value[1:-1])]
        inner = [f"{key}:{_element(f'{name}.{key.strip()}', ':'.join(rest).strip())}" for key, *rest in pairs]
        return f"{{{','.join(inner)}}}"
    hint = knobs().get(name)
    if value[:1] == "{" and value[-1:] == "}" and is_text_map(hint):
        pairs = [_split(item, ":") for item in _split(value[1:-1]) if item.strip()]
        inner = [f"{key.strip()}:{_quote(':'.join(rest).strip(), True)}" for key, *rest in pairs if rest]
        return f"{{{','.join(inner)}}}" if len(inner) == len(pairs) else value
    if value.lower() == "null" and not (is_text(hint) and not is_text_or_null(hint)):
        return value
    if value[:1] == "[" and value[-1:] == "]" and (hint is None or not is_text(hint)):
        listed = value[1:-1].strip()
        items = [item.strip() for item in _split(listed)] if listed else []
        return f"[{','.join(_quote(item, _is_text(name, item)) for item in items)}]"
    return _quote(value, _is_text(name, value))


def _is_text(name: str, value: str) -> bool:
    """Whether a value of the setting or group called `name` is text, whatever it looks like."""
    hint = knobs().get(name)
    if hint is None and "." not in name:
        return isinstance(_read(value), int | float)  # the choice of a group is the name of a file
    return is_text(hint) or is_text_list(hint) or _setting(name) != name


def _quote(value: str, text: bool) -> str:
    """The value in quotes, if it has to be `text` and Hydra would read another, or if it is not ASCII."""
    if _QUOTED.fullmatch(value) or not (text or not value.isascii()):
        return value
    plain = _ESCAPED.sub(r"\1", value)
    return value if _read(value) == plain else QuotedString(plain, Quote.single).with_quotes()


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _read(value: str) -> Any:
    """What Hydra makes of a value without quotes; None if it cannot read it."""
    try:
        return _parser().parse_rule(value, "element")
    except HydraException:
        return None


def _split(text: str, separator: str = ",") -> list[str]:
    """`text` cut at each separator that is outside of brackets and quotes and has no backslash before it."""
    parts, start, at, depth, before = [], 0, 0, 0, separator
    while at < len(text):
        char, quote = text[at], None
        if before in f"{_OPEN}{separator},:=":
            quote = _QUOTED.match(text, at)
        if quote or char == "\\":
            at, before = (quote.end() if quote else at + 2), "x"
            continue
        if char == separator and depth <= 0:
            parts.append(text[start:at])
            start = at + 1
        depth += (char in _OPEN) - (char in _CLOSE)
        before = before if char == " " else char
        at += 1
    return [*parts, text[start:]]


def _leaves(name: str, value: Any) -> Iterator[str]:
    """The settings under `name` that a value of the command line gives: a section's may come as a mapping."""
    if isinstance(value, dict) and name not in knobs():
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield _setting(name)
