"""What a streaming run cost, beside the report."""

import time
from dataclasses import dataclass, field


@dataclass
class StreamingSummary:
    """Counted while a run goes on; of a resumed run, its last part only.

    Attributes:
        passes: How often the original weights are read.
        forwards: How often the calibration data go through a decoder layer, at most; 0 with saved statistics.
        device: Where layers are computed.
        num_decoder_layers: Of the model.
        resumed_visits: Visits of layers that an earlier run had done.
        bytes_read: Of weights.
        bytes_written: Of weights, hidden states and what calibration left.
        seconds_of_step: By "read", "forward", "merge" and "write".
    """

    passes: int
    forwards: int
    device: str
    num_decoder_layers: int
    resumed_visits: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    seconds_of_step: dict[str, float] = field(default_factory=dict)

    def add_seconds(self, step: str, start: float) -> float:
        """Count the time since `start` for `step`; returns the time now."""
        now = time.perf_counter()
        self.seconds_of_step[step] = self.seconds_of_step.get(step, 0.0) + now - start
        return now
