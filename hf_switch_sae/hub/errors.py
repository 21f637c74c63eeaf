"""The Hub client's errors -> one sentence that says what was refused, and what to do.

Beware The order of the cases matters: a private repository looks to a stranger like one that does
       not exist, and to the client a gated one is a kind of RepositoryNotFoundError. An OSError may
       come from this machine's disk or from the network, and the client's HTTP library has network
       errors of its own, which are no OSErrors.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_switch_sae.errors import HubError

_ON_THE_WAY: type[Exception] = HfHubHTTPError.__bases__[0]
"""The base of all errors of the client's HTTP library, whichever library that is."""
_NETWORK = (ConnectionError, TimeoutError, socket.gaierror, socket.herror, ssl.SSLError)
_UNREACHABLE = {errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_STATUS = {
    400: "the Hub finds the request invalid",
    401: "the Hub wants a token: log in with `hf auth login`, or pass token=",
    403: "your token may not do that: it needs access to this repository, and write rights to push",
    404: "there is no such address",
    409: "somebody else committed at the same time: try again",
    413: "the file is too large for the Hub",
    429: "too many requests: wait some minutes and try again (a token raises the limit)",
}


@contextmanager
def plain_hub_errors(repo_id: str, what: str) -> Iterator[None]:
    """Turn the client's errors into HubErrors: "could not <what> <repo_id>: <reason>"."""
    try:
        yield
    except HubError:
        # it is an OSError too, and comes from a call within, which has said what went wrong
        raise
    except (_ON_THE_WAY, HFValidationError, EntryNotFoundError, OSError, RuntimeError) as err:
        # if an upload stops, the client wraps the error in a RuntimeError
        cause = err.__cause__ if isinstance(err, RuntimeError) else err
        # a RuntimeError without a cause is not the client's
        if not isinstance(cause, Exception):
            raise
        raise HubError(f"could not {what} {repo_id}: {_reason(cause)}") from err


def _reason(err: Exception) -> str:
    # the second is an EntryNotFoundError too, and would read as a missing file
    if isinstance(err, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return "the Hub is offline or can't be reached, and the cache does not have what is needed."
    if isinstance(err, GatedRepoError):
        return (
            "it is gated: ask for access on its page on the Hub, then log in with "
            "`hf auth login` or pass token=."
        )
    if isinstance(err, RepositoryNotFoundError):
        return (
            "there is no such repository, or it is private: check the name, and log in with "
            "`hf auth login` or pass token= if it is yours."
        )
    if isinstance(err, RevisionNotFoundError):
        return "it has no such revision: give a branch, a tag or a full commit id."
    if isinstance(err, EntryNotFoundError):
        return "it has no such file."
    if isinstance(err, HfHubHTTPError):
        status = err.response.status_code
        said = f" (it says: {err.server_message})" if err.server_message else ""
        what = "the Hub itself failed: try again later" if status >= 500 else _STATUS.get(status)
        return f"{what or 'the Hub refused'}, HTTP {status}{said}."
    if isinstance(err, HFValidationError):
        return f"that is no name of a repository: {err}"
    if isinstance(err, LocalTokenNotFoundError):
        return _STATUS[401] + "."
    if isinstance(err, OSError) and _is_of_this_machine(err):
        what = "the disk is full; make room" if err.errno in _FULL else "check it"
        return f"{err.filename or 'a file on this machine'}: {err.strerror}: {what} and try again."
    return f"the Hub can't be reached or the connection was lost ({_last_line(err)})."


def _is_of_this_machine(err: OSError) -> bool:
    """Whether an OSError is about a file rather than the network, whose errors have numbers too."""
    return not (isinstance(err, _NETWORK) or err.errno is None or err.errno in _UNREACHABLE)


def _last_line(err: Exception) -> str:
    return str(err).strip().splitlines()[-1] if str(err).strip() else type(err).__name__
