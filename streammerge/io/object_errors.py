"""One-line errors for what an object store answers.

obstore reports the status and the body of an answer as text; only the status and the error's code are taken from it, so
that no address, header or credential reaches a message.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from streammerge.errors import ModelError, StreammergeError, WorldError, printable
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

AGAIN = "finished work is kept; run the same command again"
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY",
}
"""The variables of the environment that give credentials, by scheme."""
_STATUS = late_pattern(r"status code: (\d{3})")
_SECONDS = late_pattern(r" in (\d+(?:\.\d+)?)s, after \d+ retries")
_CODE = late_pattern(r"<Code>(\w{1,60})</Code>|\"code\": ?\"(\w{1,60})\"")
_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_OF_HOST = (
    "169.254.169.254",
    "metadata.google.internal",
    "InstanceCredential",
    "TokenRequest",
    "TokenResponse",
)
"""Parts of errors that come from asking the machine itself for credentials, after none were found."""


@dataclass(frozen=True)
class Answer:
    """A failed request."""

    url: str
    kind: str
    """The name of obstore's exception."""
    status: int
    """The HTTP status; 0 if there was no answer."""
    code: str
    """The store's own code, such as ``SlowDown``; empty without one."""
    text: str

    @property
    def scheme(self) -> str:
        """``s3``, ``gs`` or ``az``."""
        return self.url.partition("://")[0]

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return self.url.partition("://")[2].partition("/")[0]

    @property
    def shown(self) -> str:
        """Status and code, for a message."""
        return " ".join(filter(None, (str(self.status or ""), self.code))) or "no answer"


_Rule = tuple[Callable[[Answer], bool], type[StreammergeError], str]
_RULES: tuple[_Rule, ...] = (
    (
        lambda a: a.code in _NO_BUCKET,
        ModelError,
        "there is no bucket {bucket}: correct the URL, or name the place that it is in (AWS_ENDPOINT_URL, AWS_REGION)",
    ),
    (
        lambda a: a.kind == "PreconditionError" or a.status == 412,
        WorldError,
        "an input changed during the merge: start over with --overwrite",
    ),
    (
        lambda a: a.code in _ELSEWHERE or a.status in (301, 307) or "redirect" in a.text,
        ModelError,
        "the bucket is in a different region ({shown}): set AWS_REGION to its region",
    ),
    (
        lambda a: not a.status and any(part in a.text for part in _OF_HOST),
        ModelError,
        "there are no credentials: set {credentials} in the environment",
    ),
    (
        lambda a: a.status in (401, 403),
        ModelError,
        "access is denied ({shown}): give credentials that may do this in the environment ({credentials})",
    ),
    (
        lambda a: a.status in (429, 503) or a.code == "SlowDown",
        WorldError,
        "the store is asked for more than it gives ({shown}): use fewer workers or connections; " + AGAIN,
    ),
    (lambda a: a.status >= 500, WorldError, "the store failed ({shown}): " + AGAIN),
    (
        lambda a: not a.status and ("TimedOut" in a.text or "timed out" in a.text),
        WorldError,
        "the store did not answer in time: check the network; " + AGAIN,
    ),
    (
        lambda a: not a.status and ("Connect" in a.text or "error sending request" in a.text),
        WorldError,
        "the store cannot be reached: check the network and the endpoint (AWS_ENDPOINT_URL); " + AGAIN,
    ),
)
"""What an answer is, its error, and the message; the first that fits."""


def explained(url: str, error: BaseException) -> StreammergeError | FileNotFoundError:
    """Return the error for a failed request; FileNotFoundError if there is no such object."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    answer = Answer(
        url,
        type(error).__name__,
        int(status[1]) if status else 0,
        (code[1] or code[2]) if code else "",
        text,
    )
    for fits, kind, message in _RULES:
        if fits(answer):
            what = message.format(
                bucket=printable(answer.bucket, 80),
                shown=answer.shown,
                credentials=CREDENTIALS.get(answer.scheme, ""),
            )
            return kind(f"{printable(url)}: {what}")
    if isinstance(error, (FileNotFoundError, ValueError)) or answer.status == 404:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return WorldError(f"{printable(url)}: the store gave an error ({answer.shown}): {AGAIN}")


def is_passing(error: Exception) -> bool:
    """Return whether a request may succeed later: the store is away, overloaded, or failed by itself."""
    text = str(error)
    status = _STATUS.search(text)
    if status is not None:
        return int(status[1]) == 429 or int(status[1]) >= 500
    return type(error).__name__ == "GenericError" and not any(part in text for part in _OF_HOST)


def is_aborted(error: Exception) -> bool:
    """Return whether the store knows an upload no more: it lost it, or a different process has aborted it."""
    return "<Code>NoSuchUpload</Code>" in str(error)


def seconds_spent(error: Exception) -> float:
    """Return the seconds for which the library has repeated a request before it gave up; 0 if that is not told.

    >>> seconds_spent(OSError("Error performing PUT http://h/b/x in 12.5s, after 7 retries, max_retries: 60"))
    12.5
    """
    found = _SECONDS.search(str(error))
    return float(found[1]) if found else 0.0


def while_merging(url: str, error: Exception) -> StreammergeError:
    """Return the error for a request that failed after the plan was made, when finished work is kept."""
    what = explained(url, error)
    if isinstance(what, FileNotFoundError):
        return WorldError(f"{printable(url)}: an input is gone: restore it and start over with --overwrite")
    if isinstance(what, ModelError):
        return WorldError(f"{what}; {AGAIN}")
    return what


def while_writing(url: str, error: BaseException) -> StreammergeError:
    """Return the error for a write that failed."""
    what = explained(url, error)
    return what if isinstance(what, WorldError) else WorldError(f"{what}; {AGAIN}")
