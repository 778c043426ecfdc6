"""Compressed models to the Hub: everything that belongs to one in one commit, with its generated card."""

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from ..evaluation.scores import Evaluation
from ..local_paths import hub_id
from ..modeling.client_keys import add_client_keys
from ..modeling.offload import offloaded_state_dict
from .card import write_card
from .checkpoint_files import checkpoint_files
from .hub_errors import access_token, explained
from .page import write_pages
from .published import WEIGHTS, add_tags, published
from .report import REPORT_FILE, read_report, write_report
from .statistics_file import STATISTICS_FILE, read_statistics, write_statistics

MAIN = "main"
logger = logging.getLogger(__name__)


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload the folder of a compressed model to the Hub: weights, tokenizer, reports, plots, recipe, card and all.

    It is one commit, so that no reader meets half of a model, made after all content has arrived. That is why it is
    huggingface_hub's `create_commit` and not its `upload_folder`, which splits large folders. Content is stored by
    its hash: an upload that was interrupted goes on with the files that are missing when it is called again, and a
    folder that the repository already holds makes no commit. Weight files of an earlier model that the folder no
    longer has are deleted in the same commit; transformers would load them first. Anything else stays.

    Folders of this machine are cut from reports and configuration, see `published`; nothing in `folder` changes.

    Args:
        folder: What `compress_moe(..., output_dir=...)`, `hf-mcsmoe compress` or `recover` wrote.
        repo_id: "owner/name", or "name" for a repository of the token's owner. It is made if there is none.
        private: Of a new repository; None: public unless the organization has another default.
        create_pr: Open a pull request instead of writing to the main branch.
        revision: Branch to write to, made from main if there is none, or "refs/pr/N" to add to a pull request.
        commit_message: Default: "Upload compressed model".
        commit_description: Text below it.
        token: As everywhere in huggingface_hub: None takes HF_TOKEN or the stored login.

    Returns:
        The new commit, or the last one if nothing had changed; `pr_url` is that of the pull request.

    Raises:
        FileNotFoundError, ValueError: The folder is no complete checkpoint, see `checkpoint_files`; or arguments that
            contradict each other, before anything is sent.
        PermissionError, FileNotFoundError, ConnectionError, OSError: See `explained`.
    """
    secret = check_destination(repo_id, create_pr, revision, token)
    files, left_out = checkpoint_files(folder)
    if left_out:
        logger.info(f"Left out: {', '.join(left_out)}")
    api = HfApi(token=token)
    with explained(repo_id, secret):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # Pull requests have their own references, which must exist.
        if revision not in (None, MAIN) and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    contents = published(files, repo_id, secret, token)
    with explained(repo_id, secret):
        there = api.list_repo_files(repo_id, revision=revision)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        return api.create_commit(
            repo_id,
            [*operations, *map(CommitOperationDelete, _replaced_weights(there, contents))],
            commit_message=commit_message or "Upload compressed model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    tags: list[str] | str | None = None,
    max_shard_size: int | str = "50GB",
    token: str | bool | None = None,
    **options: Any,
) -> CommitInfo:
    """Upload a compressed model of either layout with its report, recipe and generated card, in one commit.

    `model.push_to_hub` does the same for the mapped layout. A native result is of a plain class of transformers,
    whose own `push_to_hub` knows neither report nor card.

    Scores stored beside the checkpoint that `model` was loaded from are left out, because its weights may have been
    changed since. Give `evaluation`, or push the folder with `push_checkpoint`.

    Args:
        model: Compressed in this process, or loaded from a folder or repository with a report.
        repo_id: See `push_checkpoint`.
        tokenizer: Tokenizer or processor, uploaded beside it.
        evaluation: Scores of this model for report and card.
        tags: More tags for the card.
        max_shard_size: Largest file of weights, as in `save_pretrained`.
        token: See `push_checkpoint`.
        options: `private`, `create_pr`, `revision`, `commit_message` and `commit_description` of `push_checkpoint`.

    Raises:
        TypeError: Not a model of transformers.
        ValueError: There is no report of a compression, the weights are only on disk (after streaming), or an
            argument that `push_checkpoint` refuses.
        OSError: See `push_checkpoint`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; it must be a PreTrainedModel. "
            "Merge adapters first (merge_and_unload), or push the adapter alone with its own push_to_hub."
        )
    values = report_of(model)
    if values is None:
        raise ValueError(
            f"No report says how {type(model).__name__} was compressed. Push the model that compress_moe returned, or "
            "the folder it wrote: push_checkpoint(folder, repo_id)."
        )
    if not hasattr(model, "hf_device_map") and all(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "model has no weights here, only on disk: compress_moe wrote them into output_dir. "
            "Push that folder: push_checkpoint(output_dir, repo_id)."
        )
    secret = check_destination(repo_id, options.get("create_pr", False), options.get("revision"), token)
    with explained(repo_id, secret):  # before the weights are written, which may take long
        created = HfApi(token=token).create_repo(repo_id, private=options.get("private"), exist_ok=True)
    if values.pop("evaluation", None) is not None and evaluation is None:
        logger.warning(
            "The scores beside the loaded checkpoint are not published: its weights may have changed since."
        )
    tags = [*([tags] if isinstance(tags, str) else tags or []), *(model.model_tags or [])]
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary, state_dict=offloaded_state_dict(model), max_shard_size=max_shard_size)
        add_client_keys(Path(temporary), model.config, values["base_model"])
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        write_report(values, temporary, evaluation)
        write_statistics(statistics_of(model), temporary)
        write_pages(temporary)
        card = write_card(temporary, repo_name=created.repo_id)
        if tags:
            add_tags(ModelCard.load(card), tags).save(card)
        return push_checkpoint(temporary, created.repo_id, token=token, **options)


def report_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """The report of a compressed model: its own, or that beside the checkpoint it was loaded from, or None."""
    own = getattr(model, "compression_report", None)
    if own is not None:
        return own.to_dict()
    found = _beside(model, REPORT_FILE)
    return read_report(found) if found is not None else None


def statistics_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """The arrays of a compressed model's report: its own, or those beside the checkpoint it was loaded from."""
    own = getattr(model, "compression_report", None)
    if own is not None:
        return own.statistics
    found = _beside(model, STATISTICS_FILE)
    return read_statistics(found.parents[1]) if found is not None else {}


def _beside(model: PreTrainedModel, name: str) -> Path | None:
    """A file of the checkpoint that a model was loaded from; None if there is none, or no connection."""
    source = model.config.name_or_path
    found = Path(source or "") / name
    if hub_id(source):
        flags = ("missing_entries", "gated_repo", "connection_errors")
        # None where the model was loaded without a report, or offline.
        found = cached_file(source, name, **{f"_raise_exceptions_for_{flag}": False for flag in flags})
    return Path(found) if found and Path(found).is_file() else None


def check_destination(
    repo_id: str, create_pr: bool = False, revision: str | None = None, token: str | bool | None = None
) -> str | None:
    """Raise ValueError for what no server needs to be asked about; returns the token that will be sent."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}, it must be 'owner/name'. {error}") from error
    if create_pr and revision not in (None, MAIN):
        raise ValueError(
            f"create_pr=True opens a pull request against {MAIN}, but revision is {revision!r}. Leave one of them out."
        )
    return access_token(token)


def _replaced_weights(there: list[str], contents: Mapping[str, Any]) -> list[str]:
    """Files of weights at the top of a repository that the new model does not have."""
    is_weights = [name for name in there if "/" not in name and name.endswith((WEIGHTS, SAFE_WEIGHTS_INDEX_NAME))]
    return [name for name in is_weights if name not in contents]
