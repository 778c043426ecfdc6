"""How much calibration data a model will be run on."""

import math
from dataclasses import dataclass

from ..calibration import Calibration
from ..calibration.loading import DEFAULT_NUM_SAMPLES, DEFAULT_SEQUENCE_LENGTH


@dataclass(frozen=True)
class Workload:
    """Rows of one length, without padding; the last batch may be smaller."""

    rows: int = DEFAULT_NUM_SAMPLES
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH
    batch_size: int = 8
    held_out_rows: int = DEFAULT_NUM_SAMPLES // 16  # of the rows

    @classmethod
    def of(cls, data: Calibration) -> "Workload":
        """About that of calibration data: rows are as long as their batch."""
        shapes = [batch.token_mask.shape for batch in data.batches]
        held_out = sum(batch.token_mask.shape[0] for batch in data.batches if batch.held_out)
        rows = sum(shape[0] for shape in shapes)
        length = math.ceil(sum(shape[0] * shape[1] for shape in shapes) / rows)
        return cls(rows, length, max(shape[0] for shape in shapes), held_out)

    @property
    def all_tokens(self) -> int:
        """Tokens that go through the model, held-out ones included."""
        return self.rows * self.sequence_length

    @property
    def num_tokens(self) -> int:
        """Tokens that are not held out."""
        return (self.rows - self.held_out_rows) * self.sequence_length

    @property
    def num_held_out_tokens(self) -> int:
        """Held-out tokens."""
        return self.held_out_rows * self.sequence_length

    @property
    def batches(self) -> dict[int, int]:
        """How many batches there are, by the number of their rows."""
        found: dict[int, int] = {}
        for rows in (self.rows - self.held_out_rows, self.held_out_rows):
            for size, count in ((self.batch_size, rows // self.batch_size), (rows % self.batch_size, 1)):
                if size and count:
                    found[size] = found.get(size, 0) + count
        return found

    @property
    def batch_tokens(self) -> int:
        """Tokens of the largest batch."""
        return max(self.batches) * self.sequence_length
