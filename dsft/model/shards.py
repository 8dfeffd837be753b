"""Safetensors files of bounded size, written while the tensors come in."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


@dataclass
class Shards:
    """Safetensors files written one after the other, each as soon as it is full.

    A failure is kept until `close`, because the rank that writes has to take part in all gathers.
    """

    directory: Path
    stem: str
    limit: int
    pending: dict[str, torch.Tensor] = field(default_factory=dict)
    files: list[dict[str, int]] = field(default_factory=list)
    failure: Exception | None = None

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors that lie on the host."""
        for name, tensor in tensors.items():
            if self.pending and tensor.nbytes + sum(t.nbytes for t in self.pending.values()) > self.limit:
                self._flush()
            self.pending[name] = tensor

    def close(self) -> None:
        """Write the rest, and give the files their final names and, if there are several, their index.

        Raises:
            OSError, SafetensorError: A file could not be written.
        """
        self._flush()
        if self.failure is not None:
            raise self.failure
        weight_map = {}
        for number, sizes in enumerate(self.files, start=1):
            part = f"-{number:05d}-of-{len(self.files):05d}" if len(self.files) > 1 else ""
            final = f"{self.stem}{part}.safetensors"
            self._file(number).rename(self.directory / final)
            weight_map.update(dict.fromkeys(sizes, final))
        if len(self.files) > 1:
            total = sum(sum(sizes.values()) for sizes in self.files)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            (self.directory / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        self.files.append({name: tensor.nbytes for name, tensor in self.pending.items()})
        if self.failure is None:
            try:
                if len(self.files) == 1:
                    shutil.rmtree(self.directory, ignore_errors=True)
                    self.directory.mkdir(parents=True)
                save_file(self.pending, self._file(len(self.files)), metadata={"format": "pt"})
            except (OSError, SafetensorError) as failure:
                self.failure = failure
        self.pending = {}

    def _file(self, number: int) -> Path:
        return self.directory / f"{self.stem}.{number}.safetensors"
