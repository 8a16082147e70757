"""Reads a config: a YAML file of sections and overrides `section.key=value` of the command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from megatrain.config.renamed import RENAMED, migrate
from megatrain.config.schema import Config
from megatrain.config.validation import check
from megatrain.config.values import closest, convert_value, setting_types
from megatrain.config.yaml_text import describe_yaml_error, parse
from megatrain.errors import ConfigError, format_value, truncate

Report = Callable[[ConfigError], None]
"""Called once per error: raises it, or collects it."""


def load(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Returns the validated config of a YAML file and overrides `section.key=value`.

    Raises:
        ConfigError: for the first setting that is unknown, of a wrong type or not valid.
    """
    config, errors = read(path, overrides)
    if errors:
        raise errors[0]
    check(config)
    return config


def read(
    path: str | Path | None, overrides: list[str] | None = None
) -> tuple[Config, list[ConfigError]]:
    """Parses a config without validating it; returns the config and all errors.

    Settings that cannot be parsed have their defaults; an unknown name sets the most similar one.

    Raises:
        ConfigError: if the file cannot be read.
    """
    errors: list[ConfigError] = []
    raw = _read_yaml(Path(path)) if path is not None else {}
    for override in overrides or []:
        try:
            apply_override(raw, override)
        except ConfigError as error:
            errors.append(error)
    base = Path(path).parent if path is not None else Path()
    return _from_dict(raw, base, errors.append), errors


def from_dict(raw: dict[str, Any], *, base: Path = Path()) -> Config:
    """Returns a config from nested mappings, not validated.

    Args:
        raw: settings by section and key.
        base: folder of the config file; a relative `model` path is also searched there.
    """
    return _from_dict(raw, base, _raise)


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def has_tokenizer(folder: str) -> bool:
    return any(
        (Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
    )


def _raise(error: ConfigError) -> None:
    raise error


def _from_dict(raw: dict[str, Any], base: Path, report: Report) -> Config:
    for error in _renamed_errors(raw):
        report(error)
    raw = migrate(raw)
    values: dict[str, Any] = {}
    sections = typing.get_type_hints(Config)
    for key, content in raw.items():
        name = key if isinstance(key, str) else format_value(key)  # YAML reads `on:` as true
        if name not in sections:
            report(_unknown_section(name, content, list(sections)))
            similar = closest(name, list(sections))
            if similar is None or similar in raw:
                continue
            name = similar
        try:
            if dataclasses.is_dataclass(sections[name]):
                values[name] = _section(sections[name], name, content, report)
            elif name == "model":
                values[name] = _model_value(content, base)
            else:
                values[name] = convert_value(name, content, sections[name])
        except ConfigError as error:
            report(error)
    return _with_init_from(Config(**values), base)


def _renamed_errors(raw: dict[str, Any]) -> Iterator[ConfigError]:
    types = setting_types()
    for old, new in RENAMED.items():
        section, key = old.split(".")
        if not isinstance(content := raw.get(section), dict) or key not in content:
            continue
        value = content[key]
        try:
            fixed = convert_value(new, value, types[new])
        except ConfigError:
            fixed = value
        yield ConfigError(old, truncate(value), f"was renamed to {new}", fix={new: fixed})


def _unknown_section(name: str, content: Any, sections: list[str]) -> ConfigError:
    """Returns the error; its fix moves the settings to the most similar section."""
    similar, types = closest(name, sections), setting_types()
    fix = {}
    if similar is not None and isinstance(content, dict):
        fix = {f"{similar}.{key}": value for key, value in content.items()}
    return ConfigError(
        name,
        truncate(content),
        "is not a section of the config",
        _did_you_mean(similar, sections),
        fix=fix if all(setting in types for setting in fix) else None,
    )


def _with_init_from(config: Config, base: Path) -> Config:
    """Returns the config with model and tokenizer of `train.init_from` if they are not set."""
    if config.train.init_from is None:
        return config
    folder = _find(config.train.init_from, base)
    tokenizer = config.data.tokenizer
    if tokenizer is None and has_tokenizer(folder):
        tokenizer = folder
    return dataclasses.replace(
        config,
        model=config.model or folder,
        data=dataclasses.replace(config.data, tokenizer=tokenizer),
        train=dataclasses.replace(config.train, init_from=folder),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    hint = "give a YAML file of settings; `megatrain config` prints one"
    try:
        raw = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("CONFIG", path, "does not exist", hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("CONFIG", path, f"cannot be read ({error})", hint) from None
    except yaml.YAMLError as error:
        requirement = f"must be valid YAML: {describe_yaml_error(error)}"
        raise ConfigError("CONFIG", path, requirement, hint) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", path, "must contain sections such as `train:`", hint)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in nested mappings.

    Raises:
        ConfigError: if the override has another form, or its section is not a mapping.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        hint = "for example train.steps=100"
        raise ConfigError("argument", override, "must have the form section.key=value", hint)
    try:
        value = parse(text)
    except yaml.YAMLError:
        raise ConfigError(path, truncate(text), "must be a YAML value", fix={path: text}) from None
    *parents, key = path.split(".")
    target = raw
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}  # an empty `optimizer:` is a section
        child = target[parent]
        if not isinstance(child, dict):
            requirement = f"requires `{parent}` to be a section, not {truncate(child)}"
            hint = f"write `{parent}:` with settings below it"
            raise ConfigError(path, truncate(text), requirement, hint)
        target = child
    target[key] = value


def _section(cls: type, name: str, content: Any, report: Report) -> Any:
    if content is None:
        return cls()
    if not isinstance(content, dict):
        hint = f"write `{name}:` with settings below it"
        raise ConfigError(name, truncate(content), "must be a section of settings", hint)
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in content.items():
        known: str | None = key
        if key not in hints:
            similar = closest(str(key), list(hints))
            report(
                ConfigError(
                    f"{name}.{key}",
                    truncate(value),
                    "is not a setting",
                    _did_you_mean(similar, list(hints)),
                    fix={f"{name}.{similar}": value} if similar else None,
                )
            )
            known = similar if similar not in content else None
        try:
            if known is not None:
                values[known] = convert_value(f"{name}.{known}", value, hints[known])
        except ConfigError as error:
            report(error)
    return cls(**values)


def _model_value(content: Any, base: Path) -> str | dict[str, Any]:
    if isinstance(content, dict):
        return content
    if not isinstance(content, str):
        requirement = "must be a folder, a config.json or the fields of a Hugging Face config"
        hint = "for example model.model_type=llama"
        raise ConfigError("model", truncate(content), requirement, hint)
    return _find(content, base)


def _find(path: str, base: Path) -> str:
    """Returns the path relative to the config file if it exists only there."""
    local = base / path
    return str(local) if not Path(path).exists() and local.exists() else path


def _did_you_mean(similar: str | None, known: list[str]) -> str:
    return f"did you mean `{similar}`?" if similar else f"known: {', '.join(known)}"
