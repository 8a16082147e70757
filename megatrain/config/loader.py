"""Settings from a YAML file of sections, with `section.key=value` words of the command line laid over it, and back."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml

from megatrain.config.renamed import RENAMED, migrate
from megatrain.config.schema import Config
from megatrain.config.validation import check
from megatrain.config.yaml_text import describe_yaml_error, parse
from megatrain.errors import ConfigError, format_value, truncate


def load(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML config and lay `section.key=value` words over it.

    Raises ConfigError for a file that cannot be read, an unknown setting, a wrong type or a value out of range.
    """
    config, wrong = read(path, overrides)
    if wrong:
        raise wrong[0]
    check(config)
    return config


def read(
    path: str | Path | None, overrides: list[str] | None = None
) -> tuple[Config, list[ConfigError]]:
    """What `load` reads, unchecked, and all that cannot be read. In its stead stands the default; a misspelt setting counts as the one it is like.

    Raises ConfigError only for a file that cannot be read.
    """
    wrong: list[ConfigError] = []
    raw = _read_yaml(Path(path)) if path is not None else {}
    for word in overrides or []:
        try:
            apply_override(raw, word)
        except ConfigError as error:
            wrong.append(error)
    base = Path(path).parent if path is not None else Path()
    return _from_dict(raw, base, wrong.append), wrong


def from_dict(raw: dict[str, Any], *, base: Path = Path()) -> Config:
    """A typed config from nested mappings; a relative `model` path is looked up beside the config file too."""
    return _from_dict(raw, base, _refuse)


_LARGEST = 2**63 - 1

Refuse = Callable[[ConfigError], None]
"""What is done about a setting that cannot be read."""


def _refuse(error: ConfigError) -> None:
    raise error


def _from_dict(raw: dict[str, Any], base: Path, refuse: Refuse) -> Config:
    values: dict[str, Any] = {}
    sections = typing.get_type_hints(Config)
    for error in _renamed_errors(raw):
        refuse(error)
    raw = migrate(raw)
    for written, content in raw.items():
        name = (
            written if isinstance(written, str) else format_value(written)
        )  # YAML reads `on:` as true
        if name not in sections:
            refuse(
                ConfigError(
                    name,
                    truncate(content),
                    "is not a section of the config",
                    _did_you_mean(name, list(sections)),
                    fix=_in_section(next(iter(_alike(name, list(sections))), ""), content),
                )
            )
            name = next((like for like in _alike(name, list(sections)) if like not in raw), "")
        try:
            if name == "model":
                values[name] = _model_value(content, base)
            elif name == "task":
                values[name] = _typed(name, content, sections[name])
            elif name:
                values[name] = _section(sections[name], name, content, refuse)
        except ConfigError as error:
            refuse(error)
    return _with_folder(Config(**values), base)


def _renamed_errors(raw: dict[str, Any]) -> Iterator[ConfigError]:
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if isinstance(content := raw.get(section), dict) and key in content:
            yield ConfigError(
                old,
                truncate(content[key]),
                f"was renamed to {new}",
                fix={new: _if_typed(new, content[key])},
            )


def _if_typed(name: str, value: Any) -> Any:
    """Returns `value` as the type of the setting, or unchanged if it does not have that type."""
    section, key = name.split(".")
    hint = typing.get_type_hints(typing.get_type_hints(Config)[section])[key]
    try:
        return _typed(name, value, hint)
    except ConfigError:
        return value


def _in_section(name: str, content: Any) -> dict[str, Any]:
    """Returns the settings in `content` as settings of section `name`; empty if one is unknown."""
    section = typing.get_type_hints(Config).get(name)
    hints = typing.get_type_hints(section) if dataclasses.is_dataclass(section) else {}
    if not isinstance(content, dict) or not all(key in hints for key in content):
        return {}
    return {f"{name}.{key}": value for key, value in content.items()}


def _with_folder(config: Config, base: Path) -> Config:
    """Model and tokenizer default to those of `train.init_from`."""
    if config.train.init_from is None:
        return config
    folder = _beside(config.train.init_from, base)
    tokenizer = config.data.tokenizer
    if tokenizer is None and has_tokenizer(folder):
        tokenizer = folder
    return dataclasses.replace(
        config,
        model=config.model or folder,
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
        train=dataclasses.replace(config.train, init_from=folder),
    )


def has_tokenizer(folder: str) -> bool:
    return any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def describe() -> str:
    """Every setting with its default and meaning, as `megatrain config` prints it (valid YAML)."""
    lines: list[str] = []
    for section in fields(Config):
        if section.metadata:
            default = "{}" if section.name == "model" else section.default
            lines += [f"# {section.metadata['meaning']}", f"{section.name}: {default}", ""]
            continue
        lines.append(f"{section.name}:")
        cls = typing.get_type_hints(Config)[section.name]
        hints = typing.get_type_hints(cls)
        for item in fields(cls):
            default = (
                item.default if item.default is not dataclasses.MISSING else item.default_factory()  # type: ignore[misc, operator]
            )
            shown = (
                yaml.safe_dump(default, default_flow_style=True).strip().removesuffix("...").strip()
            )
            choices = f" ({_type_name(hints[item.name])})"
            lines.append(
                f"  {item.name}: {shown}".ljust(34) + f"  # {item.metadata['meaning']}{choices}"
            )
        lines.append("")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("CONFIG", path, "does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", path, f"cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            "CONFIG", path, f"is not valid YAML: {describe_yaml_error(error)}"
        ) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", path, "must hold sections such as `train:`")
    return raw


def apply_override(raw: dict[str, Any], word: str) -> None:
    """Put one `section.key=value` word of the command line into nested mappings."""
    path, equals, text = word.partition("=")
    if not equals or not path:
        raise ConfigError(
            "argument", word, "is not of the form section.key=value", "for example train.steps=100"
        )
    try:
        value = parse(text)
    except yaml.YAMLError:
        raise ConfigError(path, truncate(text), "is not a YAML value", "quote it") from None
    *parents, key = path.split(".")
    target = raw
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}  # `optimizer:` with nothing below it is a section too
        child = target[parent]
        if not isinstance(child, dict):
            raise ConfigError(
                path,
                truncate(text),
                f"cannot be set: `{parent}` is not a section here",
                f"it is {truncate(child)}",
            )
        target = child
    target[key] = value


def _section(cls: type, name: str, content: Any, refuse: Refuse) -> Any:
    if content is None:
        return cls()
    if not isinstance(content, dict):
        raise ConfigError(
            name,
            truncate(content),
            "must be a section of settings",
            f"write `{name}:` with settings below it",
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        meant = key
        if key not in hints:
            refuse(
                ConfigError(
                    f"{name}.{key}",
                    truncate(value),
                    "is not a setting",
                    _did_you_mean(str(key), list(hints)),
                )
            )
            meant = next(
                (like for like in _alike(str(key), list(hints)) if like not in content), None
            )
        try:
            if meant is not None:
                values[meant] = _typed(f"{name}.{meant}", value, hints[meant])
        except ConfigError as error:
            refuse(error)
    return cls(**values)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` asks for; only what loses nothing is converted (2 → 2.0, 100.0 → 100)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value is False and "off" in typing.get_args(option):
                return "off"  # as YAML reads it
            same = [
                choice
                for choice in typing.get_args(option)
                if choice == value and not isinstance(value, bool)
            ]
            if same:
                return same[0]  # 1 where 1.0 was written
            if value is not None:
                choices = ", ".join(str(c) for c in typing.get_args(option))
                words = [str(c) for c in typing.get_args(option)]
                close = (
                    "write it without quotes"
                    if value in words
                    else _did_you_mean(str(value), words, always="")
                )
                raise ConfigError(name, truncate(value), f"is not one of {choices}", close)
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:
                raise ConfigError(name, truncate(value), "must be a finite number")
            return float(value)
        elif (
            option is int
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and value == value // 1
        ):
            if not -_LARGEST <= value <= _LARGEST:
                raise ConfigError(
                    name,
                    truncate(value),
                    f"is beyond {_LARGEST:.1e}, the largest whole number that is counted with",
                )
            return int(value)
        elif (option is bool and isinstance(value, bool)) or (
            option is str and isinstance(value, str)
        ):
            return value
        elif typing.get_origin(option) is list and isinstance(value, list):
            (inner,) = typing.get_args(option)
            return [_typed(f"{name}[{i}]", item, inner) for i, item in enumerate(value)]
        elif (typing.get_origin(option) or option) is dict and isinstance(value, dict):
            return value
    raise ConfigError(
        name, truncate(value), f"must be {_type_name(hint)}", f"it is {_a(type(value).__name__)}"
    )


def _model_value(content: Any, base: Path) -> str | dict[str, Any]:
    if isinstance(content, dict):
        return content
    if not isinstance(content, str):
        raise ConfigError(
            "model",
            truncate(content),
            "must be a folder, a config.json or a Hugging Face config's fields",
        )
    return _beside(content, base)


def _beside(path: str, base: Path) -> str:
    """The path, or what is there from the config's own folder where it is not found from here."""
    beside = base / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def _did_you_mean(word: str, known: list[str], always: str | None = None) -> str:
    close = _alike(word, known)
    if close:
        return f"did you mean `{close[0]}`?"
    return "known are " + ", ".join(known) if always is None else always


def _alike(word: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.5)


def _type_name(hint: Any) -> str:
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        type(None): "null",
        dict: "a mapping",
    }
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list"
    return names.get(typing.get_origin(hint) or hint, str(hint))


def _a(name: str) -> str:
    return {
        "str": "text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "NoneType": "empty",
        "list": "a list",
        "dict": "a mapping",
        "date": "a date",
        "datetime": "a time",
    }.get(name, name)
