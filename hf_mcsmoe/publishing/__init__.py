"""What a compression leaves beside the weights: report, page, plots, recipe, model card; and all of it on the Hub."""

from .card import CARD_FILE, model_card, write_card
from .hub import push_checkpoint, push_to_hub
from .page import PAGE_FILE, write_pages
from .report import RECIPE_FILE, REPORT_FILE, read_report, recipe_yaml, write_report
from .statistics_file import STATISTICS_FILE, read_statistics, write_statistics
from .trainer_card import CompressedModelCard, keep_model_card

__all__ = [
    "CARD_FILE",
    "PAGE_FILE",
    "RECIPE_FILE",
    "REPORT_FILE",
    "STATISTICS_FILE",
    "CompressedModelCard",
    "keep_model_card",
    "model_card",
    "push_checkpoint",
    "push_to_hub",
    "read_report",
    "read_statistics",
    "recipe_yaml",
    "write_card",
    "write_pages",
    "write_report",
    "write_statistics",
]
