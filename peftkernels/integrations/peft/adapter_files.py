"""An adapter's two files in HF peft's format, published so that parts of two saves are never read as one adapter.

- adapter_model.safetensors: the tensors, and in its header the configuration that belongs to them. A save is whole once
  this file is in its place, by one rename.
- adapter_config.json: the same configuration where peft looks for it. An earlier one is taken away before the tensors
  change and the new one put there afterwards: peft finds no adapter in between.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from peftkernels._files import remove_abandoned, sync_folder, write_atomically, written_beside
from peftkernels._reading import check_object, parse_json, read_json, shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# An earlier configuration while the tensors change; what a killed save leaves of it belongs to tensors of peft's, which
# have none in their header.
_EARLIER = f".{CONFIG_NAME}.{{}}.replaced"
_METADATA = "peftkernels_adapter_config"
# What decides the numbers an adapter gives. The rest may be edited: names, task, what peft makes of them.
_DECIDES = ("peft_type", "init_r", "r", "lora_alpha", "lora_dropout", "alpha_pattern", "rank_pattern")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file's header describes it; `dtype` in safetensors' words ("BF16")."""

    shape: tuple[int, ...]
    dtype: str


class AdapterFiles:
    """The files of one directory, whose tensors are read by `load`.

    Attributes:
        config: the configuration.
        tensors: name in the file → shape and dtype.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file, which is named, cannot be read, or the two belong to different saves.
    """

    def __init__(self, directory: Path) -> None:
        self.config_path, self.weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
        while True:
            before = self._weights_found()
            try:
                self._file, self.tensors, saved = _opened(self.weights_path)
                self.config = self._config(saved)
                return
            except (ValueError, FileNotFoundError):
                # A save may have come between the reading of the two.
                if self._weights_found() == before:
                    raise

    def load(self) -> dict[str, Tensor]:
        """All tensors, on the CPU, of the file whose header was read, even where it was replaced since."""
        try:
            return {name: self._file.get_tensor(name) for name in self.tensors}
        except SafetensorError as error:
            raise _unreadable(self.weights_path, error) from error

    def _weights_found(self) -> tuple[int, int]:
        if not self.weights_path.is_file():
            missing = WEIGHTS_NAME if self.config_path.is_file() else f"{CONFIG_NAME} and no {WEIGHTS_NAME}"
            where = self.weights_path.parent
            raise FileNotFoundError(f"directory: found no {missing} in {where}, expected an adapter's directory")
        found = self.weights_path.stat()
        return found.st_ino, found.st_mtime_ns

    def _config(self, saved: str | None) -> dict[str, Any]:
        """The configuration beside the tensors, checked against the one `saved` with them; peft saves none there."""
        own = None
        if saved is not None:
            own = check_object(parse_json(saved.encode(), str(self.weights_path)), f"{self.weights_path}: {_METADATA}")
        path = self.config_path
        if not path.is_file():
            if own is not None:
                return own
            path = next(path.parent.glob(_EARLIER.format("*")), path)
            if not path.is_file():
                raise FileNotFoundError(
                    f"directory: found no {CONFIG_NAME} in {path.parent}, expected it beside {WEIGHTS_NAME}"
                )
        config = check_object(read_json(path), str(path))
        if own is not None:
            different = next((name for name in _DECIDES if (own.get(name) or None) != (config.get(name) or None)), None)
            if different is not None:
                raise ValueError(
                    f"{path}: {different}: found {shown(config.get(different))}, but {WEIGHTS_NAME} beside it was "
                    f"saved with {shown(own.get(different))}, expected two files of one save: these are of different "
                    "ones, or the configuration was changed since"
                )
        return config


def _opened(path: Path) -> tuple[Any, dict[str, StoredTensor], str | None]:
    """The open file, what it holds, and the configuration in its header."""
    try:
        file = safe_open(os.fspath(path), framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    tensors = {name: StoredTensor(tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    return file, tensors, (file.metadata() or {}).get(_METADATA)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: found no readable safetensors file ({error})")


def write_adapter_files(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files: whatever interrupts this, `AdapterFiles` reads the adapter that was there before or the new
    one, and peft too or finds none."""
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    data = save(dict(tensors), metadata={"format": "pt", _METADATA: text})
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    if config_path.is_file() and config_path.read_bytes() == text.encode():
        write_atomically(weights_path, lambda file: file.write(data))
        remove_abandoned(directory, CONFIG_NAME)
        return
    earlier = directory / _EARLIER.format(secrets.token_hex(8))
    with (
        written_beside(weights_path, lambda file: file.write(data)) as weights,
        written_beside(config_path, lambda file: file.write(text.encode())) as new,
    ):
        try:
            if config_path.exists():
                os.replace(config_path, earlier)
            os.replace(weights, weights_path)
            os.replace(new, config_path)
        except BaseException:
            _complete(weights, new, earlier, config_path)
            raise
    for left in directory.glob(_EARLIER.format("*")):
        left.unlink(missing_ok=True)
    sync_folder(directory)


def _complete(weights: Path, new: Path, earlier: Path, config_path: Path) -> None:
    """Put the configuration that belongs to the tensors in its place, after an interruption."""
    right = earlier if weights.exists() else new
    if right.exists():
        os.replace(right, config_path)
