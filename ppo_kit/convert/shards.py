"""Checkpoint folders read and written tensor by tensor, so that a model never has to fit into memory."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class ShardReader:
    """The tensors of a folder by name: ``*.safetensors`` or ``pytorch_model*.bin``, one file or an index.

    A ``.bin`` file is read without running what it may hold (``weights_only=True``).

    Raises:
        ValueError: the folder holds no weights; its index names a file that is not there; a ``.bin`` file
            holds something other than tensors.
        KeyError: a tensor that the folder has not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: tuple[Path, dict[str, Tensor]] | None = None
        self.file_of = self._files()

    def __iter__(self) -> Iterator[str]:
        """Names, those of one file together."""
        return iter(sorted(self.file_of, key=lambda name: (self.file_of[name], name)))

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.file_of:
            raise KeyError(f"{self.folder} holds no tensor {name}")
        path = self.file_of[name]
        if path.suffix == ".safetensors":
            # Opened for each tensor: an open file keeps the pages of all tensors read so far.
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        return self._load_bin(path)[name]

    def _files(self) -> dict[str, Path]:
        for stem in ("model.safetensors", "pytorch_model.bin"):
            path, index = self.folder / stem, self.folder / f"{stem}.index.json"
            if index.is_file():
                weight_map = json.loads(index.read_text())["weight_map"]
                absent = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
                if absent:
                    raise ValueError(f"{index} names files that are not there: {absent}")
                return {name: self.folder / file for name, file in weight_map.items()}
            if path.suffix == ".safetensors" and path.is_file():
                with safe_open(path, framework="pt") as file:
                    return dict.fromkeys(file.keys(), path)
            if path.is_file():
                return dict.fromkeys(self._load_bin(path), path)
        raise ValueError(f"{self.folder}: no model.safetensors or pytorch_model.bin, nor an index of either")

    def _load_bin(self, path: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != path:
            self._open = None  # not two at a time
            # Files of before torch 1.6 are no zip archives and cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except UnpicklingError as error:
                raise ValueError(f"{path}: not read, it holds more than tensors: {error}") from None
            self._open = (path, tensors)
        return self._open[1]


class ShardWriter:
    """Writes tensors as safetensors files of at most ``shard_bytes`` (or one larger tensor) with an index.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> writer = ShardWriter(folder, shard_bytes=8)
    >>> for name in ("a", "b", "c"):
    ...     writer.add(name, torch.ones(1))
    >>> writer.close()
    >>> [path.name for path in sorted(folder.iterdir())][:2]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    >>> ShardReader(folder)["c"]
    tensor([1.])
    """

    def __init__(self, folder: Path, *, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.total = 0
        self._held: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        held = sum(each.nbytes for each in self._held.values())
        if self._held and held + tensor.nbytes > self.shard_bytes:
            self._flush()
        self._held[name] = tensor.contiguous()
        self.total += tensor.nbytes

    def close(self) -> None:
        """Write what is held and name the files; one file alone gets no index."""
        if self._held:
            self._flush()
        if len(self._shards) == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._part(index).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        content = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")

    def _part(self, index: int) -> Path:
        return self.folder / f"part-{index}.safetensors"

    def _flush(self) -> None:
        save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._held))
        self._held = {}
