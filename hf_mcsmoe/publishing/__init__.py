"""What a compression leaves beside the weights: report, recipe and model card; and all of it on the Hub."""

from .card import CARD_FILE, model_card, write_card
from .hub import push_checkpoint, push_to_hub
from .report import RECIPE_FILE, REPORT_FILE, read_report, recipe_yaml, write_report
from .trainer_card import CompressedModelCard, keep_model_card

__all__ = [
    "CARD_FILE",
    "RECIPE_FILE",
    "REPORT_FILE",
    "CompressedModelCard",
    "keep_model_card",
    "model_card",
    "push_checkpoint",
    "push_to_hub",
    "read_report",
    "recipe_yaml",
    "write_card",
    "write_report",
]
