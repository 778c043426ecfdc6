"""What of a run is done: one line of JSON a step, appended when its files are complete."""

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

JOURNAL_FILE = "journal.jsonl"
SHOWN_DIFFERENCES = 8


class Journal:
    """The journal in a working folder; its first line is the fingerprint of the run.

    A line that was cut short when the process was killed is dropped: its step counts as not done.

    Args:
        folder: Made if it does not exist.
        fingerprint: Everything that decides the result's bytes, as JSON.

    Raises:
        ValueError: The folder holds the journal of a run with another fingerprint.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]):
        self.folder = folder
        self.path = folder / JOURNAL_FILE
        folder.mkdir(parents=True, exist_ok=True)
        self.records = self._read()
        expected = json.loads(json.dumps(fingerprint))
        if not self.records:
            self.path.write_bytes(b"")
            self.append({"step": "start", "fingerprint": expected})
        differences = compare(self.records[0]["fingerprint"], expected)
        if differences:
            listed = "; ".join(differences[:SHOWN_DIFFERENCES])
            raise ValueError(
                f"{str(folder)!r} holds an unfinished run that cannot go on, because something changed: {listed}. "
                "Run the earlier command on the earlier model to go on, or delete that folder to start afresh."
            )
        self.resumed = len(self.records) > 1

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, record: dict[str, Any]) -> None:
        """Add a step that is done; it is on the disk when this returns."""
        with open(self.path, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)

    def done(self, step: str) -> dict[int, dict[str, Any]]:
        """The records of one kind of step, by decoder layer."""
        return {record["layer"]: record for record in self.records if record["step"] == step}

    @property
    def seconds(self) -> float:
        """How long the earlier runs took, up to their last finished step."""
        return max((record.get("seconds", 0.0) for record in self.records), default=0.0)


def compare(earlier: Any, now: Any, path: str = "") -> list[str]:
    """What differs between two JSON values, one sentence each."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*earlier, *now}):
            found += compare(earlier.get(key), now.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if earlier == now else [f"{path} was {shown(earlier)}, is {shown(now)}"]


def shown(value: Any) -> str:
    """A value in a message."""
    return "not there" if value is None else textwrap.shorten(repr(value), 60)
