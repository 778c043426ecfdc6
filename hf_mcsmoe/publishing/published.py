"""What of a checkpoint folder goes to the Hub, byte by byte: the files, the card for the repository, no paths."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers.utils import CONFIG_NAME

from ..local_paths import hub_id, with_public_models, without_paths
from .card import CARD_FILE, LICENCE_KEYS, local_licence, model_card
from .hub_errors import HTTP_ERROR
from .report import REPORT_FILE, read_report

RECOVERY_FILE = "recovery_report.json"
SECRETS = ("token", "hub_token", "push_to_hub_token")  # arguments of a training
WEIGHTS = ".safetensors"
logger = logging.getLogger(__name__)


def published(
    files: Mapping[str, Path], repo_id: str, secret: str | None = None, token: str | bool | None = None
) -> dict[str, Path | bytes]:
    """The content of a repository from the files of a checkpoint, which stay as they are.

    Folders of this machine are cut from reports and configuration. A card that was written by this package and not
    changed since, but for tags that were added, is written again for the repository: its name in title and loading
    code. One that was changed otherwise, or is that of another version, goes as it is.

    Args:
        files: What `checkpoint_files` found, by name.
        repo_id: "owner/name".
        secret: A token that none of the files may hold.
        token: With which the card of the base model is read, if it is on the Hub and its licence not known here.

    Returns:
        By name: the path of a file to be sent as it is, or bytes in its place.

    Raises:
        ValueError: A file holds the token.
    """
    contents: dict[str, Path | bytes] = dict(files)
    for name, path in files.items():
        if path.suffix == ".json":
            contents[name] = _cleaned(name, path)
    contents[CARD_FILE] = _card_for(files, repo_id, token)
    for name, content in contents.items() if secret else ():
        if not name.endswith(WEIGHTS):
            text = content if isinstance(content, bytes) else content.read_bytes()
            if secret.encode() in text:
                raise ValueError(
                    f"{name} holds your access token. Take it out, and revoke the token if others saw it."
                )
    return contents


def add_tags(card: ModelCard, tags: list[str]) -> ModelCard:
    """Append tags that the card does not have; the card is changed and returned."""
    card.data.tags = [*card.data.tags, *(tag for tag in dict.fromkeys(tags) if tag not in card.data.tags)]
    return card


def hub_licence(base_model: str | None, token: str | bool | None) -> dict[str, str] | None:
    """What the card of a model on the Hub declares as licence; None if it cannot be read or declares nothing."""
    if hub_id(base_model) is None:
        return None
    try:
        metadata = ModelCard.load(base_model, token=token, ignore_metadata_errors=True).data.to_dict()
    except (HTTP_ERROR, OSError, ValueError):  # no such model, no card, no access: not this upload's affair
        return None
    return {key: metadata[key] for key in LICENCE_KEYS if key in metadata} or None


def _cleaned(name: str, path: Path) -> Path | bytes:
    """A JSON file without folders of this machine; its path if there were none, so that no byte changes."""
    before = json.loads(path.read_text(encoding="utf-8"))
    after = before
    if name in (REPORT_FILE, RECOVERY_FILE):
        after = without_paths(_without_secrets(before))
    else:
        after = with_public_models(before)
        if name == CONFIG_NAME and "provenance" in before:
            after["provenance"] = without_paths(before["provenance"])
    if after == before:
        return path
    return (json.dumps(after, indent=2, ensure_ascii=False) + "\n").encode()


def _without_secrets(values: Any) -> Any:
    if isinstance(values, Mapping):
        return {key: _without_secrets(value) for key, value in values.items() if key not in SECRETS}
    return [_without_secrets(value) for value in values] if isinstance(values, list) else values


def _card_for(files: Mapping[str, Path], repo_id: str, token: str | bool | None) -> Path | bytes:
    report = read_report(files[REPORT_FILE])
    base = report["base_model"]
    options: dict[str, Any] = {"has_tokenizer": "tokenizer_config.json" in files, "plots": files}
    path, tags = files.get(CARD_FILE), []
    if path is not None:
        written = ModelCard.load(path)
        options |= _choices(written)
        tags = written.data.tags or []
        names = (_title(written), repo_id, None)  # None: `write_card` was not told any
        if not any(_same(add_tags(model_card(report, repo_name=name, **options), tags), written) for name in names):
            logger.warning(
                f"{path} was changed since it was written, or is that of another version of hf_mcsmoe: it is "
                "published as it is. Delete it to have a new one."
            )
            return path
    options["base_license"] = options.get("base_license") or local_licence(base) or hub_licence(base, token)
    return str(add_tags(model_card(without_paths(report), repo_name=repo_id, **options), tags)).encode()


def _choices(card: ModelCard) -> dict[str, Any]:
    """What was given to `model_card` when it wrote a card, as far as only the card knows it."""
    metadata = card.data.to_dict()
    licence = {key: metadata[key] for key in LICENCE_KEYS if key in metadata}
    relation = metadata.get("base_model_relation")
    return {"base_license": licence or None} | ({"base_model_relation": relation} if relation else {})


def _title(card: ModelCard) -> str:
    return next((line[2:] for line in card.text.splitlines() if line.startswith("# ")), "")


def _same(card: ModelCard, other: ModelCard) -> bool:
    return card.data.to_dict() == other.data.to_dict() and card.text.split() == other.text.split()
