"""How well a model predicts and writes text, by itself and beside a baseline."""

from .data import load_evaluation_data
from .intervals import Interval
from .samples import generate_samples, repetition
from .scores import DomainScore, Evaluation
from .scoring import check_causal, evaluate_model

__all__ = [
    "DomainScore",
    "Evaluation",
    "Interval",
    "check_causal",
    "evaluate_model",
    "generate_samples",
    "load_evaluation_data",
    "repetition",
]
