"""Reads the files that Weights & Biases keeps of a run (wandb ships no reader)."""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as messages


@dataclass
class Logged:
    """What one start of a run logged."""

    run: Any = None  # project, names, id
    config: dict[str, Any] = field(default_factory=dict)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)  # by W&B's step
    axes: dict[str, str] = field(default_factory=dict)  # metric -> the metric that it is drawn over
    artifacts: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # name -> kind and files
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None  # None: the file is not complete


def _records(path: Path) -> Iterator[Any]:
    """The protobuf messages of a file, which has the framing of LevelDB's log."""
    block_bytes, head_bytes, kinds_that_end = 32768, 7, (1, 4)
    data, position, parts = path.read_bytes(), 7, []
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    while position + head_bytes <= len(data):
        left = block_bytes - position % block_bytes
        if left < head_bytes:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + head_bytes])
        body = data[position + head_bytes : position + head_bytes + length]
        assert zlib.crc32(body, zlib.crc32(bytes([kind]))) == checksum
        position += head_bytes + length
        parts.append(body)
        if kind in kinds_that_end:
            record = messages.Record()  # pyright: ignore[reportAttributeAccessIssue]: made by protobuf at import
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def read_wandb(path: Path) -> Logged:
    """What is in a .wandb file, or in the only one of a run's folder."""
    if path.is_dir():
        (path,) = path.glob("wandb/*run-*/run-*.wandb")
    found = Logged()
    for record in _records(path):
        artifact = None
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _values(record.run.config.update)
            case "config":
                found.config |= _values(record.config.update)
            case "history":
                row = _values(record.history.item)
                found.rows.setdefault(row["_step"], {}).update(row)
            case "request" if record.request.WhichOneof("request_type") == "log_artifact":
                artifact = record.request.log_artifact.artifact
            case "artifact":
                artifact = record.artifact
            case "files":
                found.files += [file.path for file in record.files.files]
            case "metric":
                found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "exit":
                found.exit_code = record.exit.exit_code
        if artifact is not None:
            found.artifacts[artifact.name] = (artifact.type, [entry.path for entry in artifact.manifest.contents])
    return found
