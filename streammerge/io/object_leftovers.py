"""Abort the uploads that dead processes have left in an S3 bucket: their parts are invisible, and billed.

obstore aborts its own uploads and can list no others, so this speaks S3's protocol itself: list the uploads that are not
finished, and abort them. It is done with keys from the environment only, and never fails: a bucket's rule
(`AbortIncompleteMultipartUpload`) does the same later. Google's and Azure's parts are left to their stores' own rules.

References
----------
Signature Version 4 of requests to Amazon S3, in one chunk; ListMultipartUploads; AbortMultipartUpload.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import os
import re
import urllib.request
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

from streammerge.io.object_stores import endpoint_of, is_loopback, split_url
from streammerge.lazy import late_pattern

_UPLOAD = late_pattern(r"<Upload>(.*?)</Upload>", re.DOTALL)
_KEY, _ID = late_pattern(r"<Key>([^<]*)</Key>"), late_pattern(r"<UploadId>([^<]*)</UploadId>")
_MOST_NBYTES = 1 << 22
_SECONDS = 10.0
_EMPTY = hashlib.sha256(b"").hexdigest()


def abort_uploads(out: str, names: Collection[str]) -> int:
    """Abort the unfinished uploads of some objects below a URL; return how many there were, so far as can be told."""
    scheme, bucket, folder = split_url(out)
    if scheme != "s3" or not _keys(os.environ):
        return 0
    wanted, aborted = {f"{folder}/{name}" for name in names}, 0
    with suppress(Exception):  # what is left is left to the bucket's rule
        for key, upload in _uploads(bucket, f"{folder}/"):
            if key in wanted:
                _ask("DELETE", f"/{bucket}/{key}", {"uploadId": upload})
                aborted += 1
    return aborted


def _uploads(bucket: str, prefix: str) -> list[tuple[str, str]]:
    """Return key and number of the first thousand unfinished uploads below a prefix."""
    answer = _ask("GET", f"/{bucket}", {"prefix": prefix, "uploads": ""}).decode("utf-8", "replace")
    found = [(_KEY.search(one), _ID.search(one)) for one in _UPLOAD.findall(answer)]
    return [
        (html.unescape(key[1]).lstrip("/"), html.unescape(number[1]))
        for key, number in found
        if key and number
    ]


def _ask(method: str, path: str, query: Mapping[str, str]) -> bytes:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = endpoint_of("s3", os.environ) or f"https://s3.{region}.amazonaws.com"
    parts = urlsplit(endpoint)
    path = quote(parts.path.rstrip("/") + path, safe="/~")
    text = "&".join(f"{quote(k, safe='~')}={quote(v, safe='~')}" for k, v in sorted(query.items()))
    headers = _signed(method, parts.netloc, path, text, region, os.environ, datetime.now(UTC))
    request = urllib.request.Request(
        f"{parts.scheme}://{parts.netloc}{path}?{text}", None, headers, method=method
    )
    direct = (urllib.request.ProxyHandler({}),) if is_loopback(parts.hostname or "") else ()
    with urllib.request.build_opener(_NoRedirect, *direct).open(request, timeout=_SECONDS) as answer:
        return bytes(answer.read(_MOST_NBYTES))


def _keys(environment: Mapping[str, str]) -> tuple[str, str] | None:
    key, secret = (environment.get(name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    return (key, secret) if key and secret else None


def _signed(
    method: str,
    host: str,
    path: str,
    query: str,
    region: str,
    environment: Mapping[str, str],
    now: datetime,
) -> dict[str, str]:
    """Return the headers of a request without a body, signed with the environment's keys."""
    keys = _keys(environment)
    assert keys is not None
    time, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    headers = {"host": host, "x-amz-content-sha256": _EMPTY, "x-amz-date": time}
    if token := environment.get("AWS_SESSION_TOKEN"):
        headers["x-amz-security-token"] = token
    names = ";".join(sorted(headers))
    listed = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join((method, path, query, listed, names, _EMPTY))
    scope = f"{day}/{region}/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", time, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{keys[1]}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.new(key, to_sign.encode(), "sha256").hexdigest()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={keys[0]}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return headers


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A signature is for one host."""

    def redirect_request(self, *arguments: Any) -> None:
        """Follow nothing."""
