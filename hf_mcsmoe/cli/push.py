"""`hf-mcsmoe push`: a compressed checkpoint to the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .tables import human_bytes, print_table

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

MAX_LISTED = 20


def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a compressed model.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, made if there is none; or refs/pr/N.")
    ] = None,
    commit_message: Annotated[str | None, typer.Option("--commit-message", help="Title of the commit.")] = None,
) -> None:
    """Upload a compressed model to the Hub in one commit: weights, tokenizer, report, plots, recipe and card.

    HF_TOKEN or `hf auth login` says who you are, HF_ENDPOINT where the Hub is. Interrupted? Call it again.

    Example: hf-mcsmoe push qwen3-half me/Qwen3-30B-A3B-m-smoe-50 --private
    """
    from ..publishing import push_checkpoint

    show_files(folder, repo_id)
    options = {"create_pr": create_pr, "revision": revision, "commit_message": commit_message}
    show_commit(push_checkpoint(folder, repo_id, private=private or None, **options), create_pr)


def show_files(folder: Path, repo_id: str) -> None:
    """Check the folder, and print what of it will be uploaded."""
    from ..publishing.checkpoint_files import checkpoint_files

    files, left_out = checkpoint_files(folder)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    rows = [[name, human_bytes(size)] for name, size in sizes.items()]
    if len(rows) > MAX_LISTED:
        hidden = list(sizes.values())[MAX_LISTED:]
        rows = [*rows[:MAX_LISTED], [f"{len(hidden)} more", human_bytes(sum(hidden))]]
    rows.append([f"{len(sizes)} files", human_bytes(sum(sizes.values()))])
    print_table(f"To {repo_id}", ["file", "size"], rows)
    if left_out:
        typer.echo(f"Not uploaded: {', '.join(left_out)}")


def show_commit(commit: "CommitInfo", create_pr: bool) -> None:
    """Print where the checkpoint is now."""
    if not create_pr:
        typer.echo(f"It is there: {commit.commit_url}")
    elif commit.pr_url is None:
        typer.echo(f"The repository has all of it already, so there is no pull request: {commit.commit_url}")
    else:
        typer.echo(f"Pull request: {commit.pr_url}")
