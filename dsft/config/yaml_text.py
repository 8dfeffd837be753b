"""YAML in which a text setting is the text that stands there: `name: 2024_11_25`, `revision: 5e37820`, `name: off`.

YAML decides by looks what is a number; here the schema decides what is text.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from dsft.config.cli import quoted
from dsft.config.schema import is_text, is_text_list, is_text_map, is_text_or_null, knobs
from dsft.errors import UserError

_NULL, _TEXT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("null", "str", "merge"))
_SWEEP = "hydra.sweeper.params."


class TextFileSource(FileConfigSource):
    """Hydra's reader of `conf/` and of other directories with YAML, with text settings kept as they are written."""

    def load_config(self, config_path: str) -> ConfigResult:
        name = self._normalize_file_name(config_path)
        file = Path(os.path.realpath(os.path.join(self.path, name)))
        if not file.exists():
            raise ConfigLoadError(f"Config not found : {file}")
        text = read(file)
        header = ConfigSource._get_header_dict(text[:512])
        group = os.path.dirname(name).replace("/", ".")
        package = (header.get("package") or group).replace("_group_", group).replace("_global_", "")
        return ConfigResult(
            config=OmegaConf.create(parse(text, package.strip("."), str(file)) or {}),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=header,
        )


def register() -> None:
    """Let Hydra read every YAML file with this module."""
    Plugins.instance()  # registers Hydra's own reader, which is replaced
    SourcesRegistry.instance().types["file"] = TextFileSource


def read(file: str | Path) -> str:
    """The text of a YAML file.

    Raises:
        UserError: It cannot be read, or is not UTF-8; the message names it.
    """
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start}: save it as UTF-8.") from error


def parse(text: str, package: str = "", name: str = "YAML") -> Any:
    """The content of a YAML document whose keys are settings, or settings of the section `package`.

    Raises:
        UserError: It is not YAML; the message has `name` and the line.
    """
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(_keep_text(node, package))
    except yaml.MarkedYAMLError as error:
        raise UserError(
            f"{name}:{error.problem_mark.line + 1 if error.problem_mark else 1}: not valid YAML: {error.problem}."
        ) from error
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node, name: str) -> yaml.Node:
    """The node of the setting or section `name`, with its text as text."""
    hint = knobs().get(name)
    if isinstance(node, yaml.MappingNode):
        pairs = [(key, _keep_text(value, _inner(name, key))) for key, value in node.value]
        if is_text_map(hint):
            pairs = [pair if pair[0].tag == _MERGE else (_text(pair[0]), _text(pair[1])) for pair in pairs]
        return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark, node.flow_style)
    if isinstance(node, yaml.SequenceNode):
        items = [_text(item) if is_text_list(hint) else _keep_text(item, name) for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark, node.flow_style)
    if name.startswith(_SWEEP):
        return _text(node, quoted(name.removeprefix(_SWEEP), node.value))
    names_file = "defaults" in name.split(".")
    if node.tag == _NULL and (names_file or is_text_or_null(hint)):
        return node
    return _text(node) if names_file or is_text(hint) else node


def _inner(name: str, key: yaml.Node) -> str:
    return name if key.tag == _MERGE else f"{name}.{key.value}".removeprefix(".")


def _text(node: yaml.Node, value: str | None = None) -> yaml.Node:
    if not isinstance(node, yaml.ScalarNode):
        return node
    text = node.value if value is None else value
    return yaml.ScalarNode(_TEXT, text, node.start_mark, node.end_mark, node.style)
