"""What the Hub's refusals mean and what to do about them, in the words of this package and never with the token."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

# The base of everything that huggingface_hub's HTTP library raises, by whatever name that goes in its version.
HTTP_ERROR = HfHubHTTPError.__bases__[0]
AGAIN = "Call it again: files that have arrived are not sent again, and there is no commit before all have."


def access_token(token: str | bool | None) -> str | None:
    """The token that a call with this argument sends, None for none.

    Raises:
        ValueError: It holds characters that no token has. HTTP libraries would show it in their complaint.
    """
    found = token if isinstance(token, str) else get_token() if token is not False else None
    if found is not None and not re.fullmatch(r"[\x21-\x7e]+", found):
        raise ValueError(
            "The access token holds white space or characters that no token has. Log in again: hf auth login"
        )
    return found


@contextmanager
def explained(repo_id: str, token: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises within the context into errors that say what to do.

    Args:
        repo_id: Repository that is written.
        token: The token that is sent; it is cut from the messages.

    Raises:
        PermissionError: Not logged in, or no right to write.
        FileNotFoundError: No such repository or branch, or it is private.
        ConnectionError: The connection failed, after huggingface_hub's own retries.
        OSError: Any other refusal.
    """
    try:
        yield
    except (HTTP_ERROR, RuntimeError) as error:
        # Errors of upload threads, and of Xet's library, are wrapped into RuntimeError.
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        kind, message = _meaning(cause, repo_id, token)
    else:
        return
    # Not chained: requests and their headers hang on the original.
    raise kind(message.replace(token, "***") if token else message)


def _meaning(error: BaseException, repo_id: str, token: str | None) -> tuple[type[OSError], str]:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status is None:
        reason = f"{type(error).__name__}: {error}"
        return ConnectionError, f"The upload to {repo_id!r} was interrupted ({reason}). {AGAIN}"
    if status == 401:
        said = "does not accept the access token" if token else "was given no access token"
        return PermissionError, (
            f"{constants.ENDPOINT} {said}, which it needs for {repo_id!r} (401). "
            "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError, f"{repo_id!r} has no such branch or pull request (404). Name one that it has."
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError, (
            f"There is no repository {repo_id!r}, or it is private and not yours ({status}). "
            "Check the name and the account that HF_TOKEN belongs to."
        )
    if status == 403:
        return PermissionError, (
            f"The access token may not write to {repo_id!r} (403). Use one that may, a repository of your own, or "
            "propose the files with create_pr=True (--create-pr)."
        )
    again = AGAIN if status >= 500 or status == 429 else "See its message."
    said = " ".join(str(getattr(error, "server_message", None) or error).split())
    return OSError, f"{constants.ENDPOINT} refused the upload to {repo_id!r} ({status}): {said} {again}"
