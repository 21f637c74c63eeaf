"""What the client raises is one sentence that names the cause: the Hub, the way there, the disk."""

import errno
import socket
import ssl
import sys

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hf_switch_sae import HubError
from hf_switch_sae.hub.errors import plain_hub_errors

http = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]


def said(err: BaseException) -> str:
    with pytest.raises(HubError) as raised, plain_hub_errors("org/repo", "pull"):
        raise err
    assert raised.value.__cause__ is err
    assert str(raised.value).startswith("could not pull org/repo: ")
    return str(raised.value)


@pytest.mark.parametrize(
    "err",
    [
        http.ConnectError("Connection refused"),
        http.ReadTimeout("timed out"),
        http.RemoteProtocolError("peer closed connection"),
        http.ProxyError("no proxy"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError(errno.ETIMEDOUT, "timed out"),
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        ssl.SSLError(1, "certificate verify failed"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError("requests' kind, without a number"),
    ],
    ids=lambda err: type(err).__name__,
)
def test_what_breaks_on_the_way_is_called_the_connection(err):
    message = said(err)
    assert "can't be reached or the connection was lost" in message
    assert str(err) in message


@pytest.mark.parametrize(
    ("err", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), ["/x/y", "the disk is full"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ["this machine", "the disk is full"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), ["/x/y", "denied"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), ["/x", "Not a directory"]),
        (OSError(errno.EROFS, "Read-only file system", "/x"), ["/x", "Read-only"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_breaks_on_this_machine_is_called_by_its_file(err, words):
    message = said(err)
    assert "connection" not in message
    for word in words:
        assert word in message


def test_a_token_that_is_not_there_is_asked_for():
    assert "log in with" in said(LocalTokenNotFoundError("no token"))


def test_what_stopped_an_upload_is_found_inside_of_the_clients_own_error():
    cause = OSError(errno.ENOSPC, "No space left on device", "/x")
    with pytest.raises(HubError, match="the disk is full"), plain_hub_errors("org/repo", "push to"):
        raise RuntimeError("Error while uploading") from cause


@pytest.mark.parametrize("err", [RuntimeError("a bug"), KeyError("a bug"), KeyboardInterrupt()])
def test_what_is_neither_is_left_alone(err):
    with pytest.raises(type(err)) as raised, plain_hub_errors("org/repo", "pull"):
        raise err
    assert raised.value is err
