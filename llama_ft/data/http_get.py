"""A file's bytes over http or https, from any of its bytes on. Whatever goes wrong on the way is a NetworkError."""

from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse, InvalidURL
from urllib import request
from urllib.error import HTTPError, URLError

from llama_ft import __version__

TIMEOUT_SECONDS = 20.0  # to connect, and for each read
CHUNK_BYTES = 2**16
HANDLERS = (  # urllib's own choice would follow a redirect to ftp, too
    request.ProxyHandler,
    request.HTTPHandler,
    request.HTTPSHandler,
    request.HTTPRedirectHandler,
    request.HTTPDefaultErrorHandler,
    request.HTTPErrorProcessor,
    request.UnknownHandler,
)


class NetworkError(Exception):
    """A request or its answer failed. The text says how, in one line."""

    def __init__(self, cause: Exception | str) -> None:
        super().__init__(in_a_line(cause))
        self._cause = cause

    def may_pass(self, first: bool) -> bool:
        """Whether trying again may help. Where not even the first connection comes about, waiting rarely does."""
        if isinstance(self._cause, HTTPError):
            return self._cause.code in (408, 429) or self._cause.code >= 500
        return not isinstance(self._cause, ValueError | InvalidURL) and not (
            first and isinstance(self._cause, URLError)
        )


def get(url: str, start: int = 0) -> HTTPResponse | None:
    """The answer to a request for a file, or for its part from byte `start` on; None where nothing follows there.

    A server that knows no ranges answers with status 200 and the whole file instead of 206 and the part; one that sends
    another part than it was asked for is made to.

    Raises:
        NetworkError: if there is no such answer.
    """
    opener = request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    headers = {"User-Agent": f"llama_ft/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = opener.open(request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, HTTPError):
            error.close()
            if error.code == 416 and start:
                return None
        raise NetworkError(error) from error
    assert isinstance(response, HTTPResponse)
    given = response.headers.get("Content-Range", "")
    if response.status == 206 and not given.startswith(f"bytes {start}-"):
        response.close()
        if start:
            return get(url)
        raise NetworkError(f"asked for the whole file, the server sent {given or 'a part of it'}")
    return response


def chunks(response: HTTPResponse) -> Iterator[bytes]:
    """The content as it comes, each piece at once.

    Raises:
        NetworkError: if it ends before its stated length, or stalls.
    """
    missing = response.length  # None where no length is stated
    while missing != 0:
        try:
            chunk = response.read1(CHUNK_BYTES if missing is None else min(missing, CHUNK_BYTES))
        except (OSError, HTTPException, ValueError) as error:
            raise NetworkError(error) from error
        if not chunk:
            if missing is None:
                return
            raise NetworkError("the connection ended early")
        missing = None if missing is None else missing - len(chunk)
        yield chunk


def in_a_line(error: BaseException | str) -> str:
    """What an exception says, without the numbers of operating system errors."""
    cause = error.reason if type(error) is URLError else error
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return " ".join(text.split())
