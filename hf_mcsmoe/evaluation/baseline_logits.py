"""A baseline that many models are judged against: what it predicts is kept while it fits in memory."""

from torch import Tensor
from transformers import PreTrainedModel

from ..calibration import CalibrationBatch

MEMORY = 2**30  # bytes of logits that are kept; batches beyond them run again for each model


class BaselineLogits:
    """The logits of a model on the batches that it was asked for.

    `evaluate_model` takes it as its baseline and gives the very scores that the model would give. Batches are told
    apart by identity: the same `Calibration` has to be given each time, with the same `batch_size=None`.

    Args:
        model: The baseline; its weights may not change meanwhile.
        memory: Bytes of logits to keep, on the CPU.
    """

    def __init__(self, model: PreTrainedModel, memory: int = MEMORY):
        self.model = model
        self._left = memory
        self._kept: dict[int, tuple[CalibrationBatch, Tensor]] = {}  # the batch too: its id stays its own

    def kept(self, batch: CalibrationBatch) -> Tensor | None:
        """The logits (B S, V) of a batch, if they are kept."""
        found = self._kept.get(id(batch))
        return None if found is None else found[1]

    def keep(self, batch: CalibrationBatch, logits: Tensor) -> None:
        """Keep the logits (B S, V) of a batch if there is room."""
        size = logits.numel() * logits.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[id(batch)] = (batch, logits.cpu())
