"""Messages of failed downloads."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

_ERROR_NUMBER = re.compile(r"\[Errno -?\d+\] ")


class HubError(Exception):
    """A model cannot be downloaded or removed. The message is one line with the reason and a remedy."""


def shown_url(url: str) -> str:
    """Returns the URL without user, password and query, which can contain secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextmanager
def hub_errors(name: str, *, token: bool) -> Iterator[None]:
    """Raises HubError for the errors that connections, replies and the disk cause in the `with` block.

    `name` is the repository, file or URL in the message. `token` is True if an access token was sent.
    """
    from httpx2 import HTTPError, InvalidURL, RequestError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(_refusal(name, error, token)) from None
    except (ValueError, InvalidURL) as error:  # also HFValidationError, and names that no file can have
        raise HubError(f"{name}: {error}") from None
    except (RequestError, HTTPError) as error:
        raise HubError(f"{name}: {_connection_reason(error)}; check the network, or use --offline") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(f"{name}: no space left on the disk; the same command continues the download") from None
        raise HubError(f"{name}: {error.strerror or _first_line(error)}") from None


def _refusal(name: str, error: object, token: bool) -> str:
    """Returns the sentence for an error response of a server."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    token_hint = "give a token of an account with access by --hf-token or HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated ({status}): accept its terms on its page, and {token_hint}"
    if status == 401 and token:
        return f"{name} does not exist, or the access token is invalid or has no access (401)"
    if status == 401:
        return f"{name} does not exist, or is private (401): {token_hint}"
    if status == 403:
        return f"access to {name} is refused (403): {token_hint}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {name} ({status})"
    if isinstance(error, RemoteEntryNotFoundError) or status == 404:
        return f"there is no {name} ({status})"
    later = "; try again later" if status == 429 or status >= 500 else ""
    return f"{name}: the server replied {status} {error.response.reason_phrase}{later}"


def _connection_reason(error: Exception) -> str:
    from httpx2 import ConnectError, TimeoutException

    if isinstance(error, TimeoutException):
        return "the server does not reply in time"
    text = _ERROR_NUMBER.sub("", _first_line(error))
    if isinstance(error, ConnectError):
        return f"cannot connect: {text}"
    return f"the connection broke off: {text}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
