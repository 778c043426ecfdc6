"""The model card: every number in it comes from the report, and what was not measured says so."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from transformers.models.auto import modeling_auto

from ..evaluation.scores import Evaluation
from ..local_paths import hub_id
from ..publishing import card_text
from ..recipe import Recipe
from ..recipe_reading import recipe_from_dict
from .card_plots import card_plots, plots_of_folder
from .report import read_report, recipe_yaml

CARD_FILE = "README.md"
TEMPLATE = Path(__file__).with_name("model_card_template.md")
LICENCE_KEYS = ("license", "license_name", "license_link")
# What loads a class, and what the Hub calls its task. The first entry that lists the class counts.
TASKS = (
    ("AutoModelForImageTextToText", "image-text-to-text", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ("AutoModelForSeq2SeqLM", None, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("AutoModelForCausalLM", "text-generation", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (
        "AutoModelForSequenceClassification",
        "text-classification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
)


def model_card(
    report: Mapping[str, Any],
    *,
    repo_name: str | None = None,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_model_relation: str = "quantized",
    base_license: str | Mapping[str, str] | None = None,
    has_tokenizer: bool = True,
    plots: Collection[str] = (),
) -> ModelCard:
    """The card of a compressed model, ready to be saved as README.md.

    Args:
        report: What `read_report` or `write_report` gave. A local path in it is never published.
        repo_name: Hub id of the compressed model, for its title and the loading code.
        evaluation: Scores; None takes those in the report. Without any the card says "not evaluated".
        base_model: Hub id of the base model; None takes that of the report.
        base_model_relation: Of the four that the Hub knows, "quantized" is the closest for one parent.
        base_license: As in the metadata of the base model's card; a mapping may have `LICENCE_KEYS`. None: unknown.
        has_tokenizer: The tokenizer is saved beside the model; else the base model's is loaded.
        plots: Names of the plots beside the card, see `card_plots`.

    Raises:
        ValueError: The recipe in the report is not valid.
    """
    recipe = recipe_from_dict(report["recipe"])
    scores = report.get("evaluation") if evaluation is None else evaluation
    scores = scores.to_dict() if isinstance(scores, Evaluation) else scores
    base_id = hub_id(base_model or report["base_model"])
    base = card_text.link(base_id, report["base_model"])
    licence = {"license": base_license} if isinstance(base_license, str) else dict(base_license or {})
    auto_class, pipeline_tag = _task(report["base_architecture"])
    parent = {"base_model": base_id, "base_model_relation": base_model_relation} if base_id else {}
    is_native = recipe.layout == "native" or bool(report.get("export"))
    metadata = _metadata(recipe, is_native, pipeline_tag=pipeline_tag, **parent, **licence)
    model_id = repo_name or "path/to/this/model"
    name = repo_name or f"{base_id or Path(report['base_model'] or 'model').name} compressed"
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        title=name.split("/")[-1],
        licence=card_text.licence(licence, base),
        recipe=recipe_yaml(report).strip(),
        is_native=is_native,
        architecture=report["base_architecture"],
        auto_class=auto_class,
        model_id=model_id,
        base_id=base_id or "path/to/the/base/model",
        tokenizer_id=model_id if has_tokenizer or base_id is None else base_id,
        plots=card_plots(plots),
        **card_text.sections(report, recipe, scores, base),
    )


def write_card(folder: str | Path, **options: Any) -> Path:
    """Write README.md from the report in the folder of a checkpoint; a card that is there is replaced.

    Args:
        folder: Holds `compression_report.json`; a tokenizer in it is noticed.
        options: Of `model_card`. Without `base_license` the base model's card is asked, see `local_licence`.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: There is no report.
        ValueError: The report cannot be read.
    """
    folder = Path(folder)
    report = read_report(folder)
    found = {
        "base_license": local_licence(report["base_model"]),
        "has_tokenizer": (folder / "tokenizer_config.json").is_file(),
        "plots": plots_of_folder(folder),
    }
    card = model_card(report, **{**found, **options})
    card.save(folder / CARD_FILE)
    return folder / CARD_FILE


def local_licence(base_model: str | None) -> dict[str, str] | None:
    """What the card of a base model declares as licence, as far as this machine knows it.

    Args:
        base_model: A folder, or a Hub id whose card is in the cache; no network is used.

    Returns:
        None if there is no card here, or it declares nothing.
    """
    path = Path(base_model or "") / CARD_FILE
    if hub_id(base_model):
        cached = try_to_load_from_cache(base_model, CARD_FILE)
        path = Path(cached) if isinstance(cached, str) else path
    if not base_model or not path.is_file():
        return None
    try:
        metadata = metadata_load(path)
    except (yaml.YAMLError, ValueError):  # another model's damaged card is no reason to lose a finished run
        return None
    return {key: metadata[key] for key in LICENCE_KEYS if key in metadata} if metadata else None


def _task(architecture: str) -> tuple[str, str | None]:
    """The Auto class that loads models of a class, and the Hub's name of their task."""
    for auto_class, pipeline_tag, names in TASKS:
        # Some entries name several classes.
        if any(architecture in ((name,) if isinstance(name, str) else name) for name in names.values()):
            return auto_class, pipeline_tag
    return "AutoModel", None


def _metadata(recipe: Recipe, is_native: bool, **others: Any) -> ModelCardData:
    kind = "expert-pruning" if recipe.merging is None else "expert-merging"
    return ModelCardData(
        library_name="transformers" if is_native else "hf_mcsmoe",
        tags=["moe", "mixture-of-experts", "model-compression", kind, *([recipe.preset] if recipe.preset else [])],
        **others,
    )
