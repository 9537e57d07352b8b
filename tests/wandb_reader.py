"""Reads an offline W&B run without a network: LevelDB's log format around one protobuf `Record` each."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, CHUNK_HEADER = 32 * 1024, struct.Struct("<4sHB"), struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class Run:
    """What a run logged.

    `history` has a row for each `wandb.log`, with its keys as they were logged; `media` is the folder of its images.
    """

    media: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def column(self, key: str) -> list[Any]:
        return [row[key] for row in self.history if key in row]


def read_run(root: Path) -> Run:
    """The only run below `root`, the `save_dir` of a `WandbLogger`, once it has ended."""
    (path,) = root.rglob("*.wandb")
    run = Run(path.parent / "files" / "media")
    for kind, record in _ended(path):
        if kind == "history":
            run.history.append(_decoded(record.history.item))
        elif kind == "summary":
            run.summary |= _decoded(record.summary.update)
        elif kind == "config":
            run.config |= _decoded(record.config.update)
        elif kind == "run":
            run.config |= _decoded(record.run.config.update)
    return run


def _ended(path: Path, patience: float = 60.0) -> list[tuple[str, Any]]:
    """Records of a run up to its exit, which W&B's own process may write after `finish` has returned."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + patience
    while True:
        records = [Record.FromString(payload) for payload in _payloads(path.read_bytes())]
        kinds = [record.WhichOneof("record_type") for record in records]
        if "exit" in kinds:
            return list(zip(kinds, records, strict=True))
        assert time.monotonic() < deadline, f"{path} has no exit record after {patience} s, only {kinds}"
        time.sleep(0.1)


def _decoded(items: Any) -> dict[str, Any]:
    """Values by key; a dictionary that was logged, as images are, comes back as one."""
    values: dict[str, Any] = {}
    for item in items:
        *outer, key = list(item.nested_key) or [item.key]
        place = values
        for name in outer:
            place = place.setdefault(name, {})
        place[key] = json.loads(item.value_json)
    return values


def _payloads(data: bytes) -> Iterator[bytes]:
    if len(data) < FILE_HEADER.size:
        return
    name, magic, _ = FILE_HEADER.unpack_from(data)
    assert (name, magic) == (b":W&B", 0xBEE1), "not a W&B file"
    position, parts = FILE_HEADER.size, b""
    while position + CHUNK_HEADER.size <= len(data):
        room = BLOCK - position % BLOCK
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        if room < CHUNK_HEADER.size or kind not in (FULL, FIRST, MIDDLE, LAST):
            position += room  # the end of a block is padding
            continue
        position += CHUNK_HEADER.size
        if position + length > len(data):
            return  # still being written
        chunk = data[position : position + length]
        position += length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
