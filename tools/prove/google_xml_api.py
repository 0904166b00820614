"""A server of the part of Google Cloud Storage's XML API that obstore's client uses, in front of a real S3 server.

No emulator that can be had serves it: `fake-gcs-server` refuses the PUT of an object there; `gcp-storage-emulator` 2026.7.19
has no HEAD, no list and no upload in parts in it. The XML API is documented as that of S3 with headers of its own, so this
server only translates and signs: the condition `x-goog-if-generation-match: 0` ("only if there is none") becomes
`If-None-Match: *`, requests are signed, whatever token they have, and what it does not know is refused with 501. The objects,
lists, ETags, ranges, conditions and parts are those of the S3 server.

It shows that what we send through Google's client is accepted by a store that follows the documents, in every step of a
merge. It shows nothing of Google's own servers: their limits, their consistency, their tokens.

References
----------
XML API of Cloud Storage: request headers, object multipart uploads. Signature Version 4 of requests to Amazon S3.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from urllib.parse import parse_qsl, quote, unquote, urlsplit

_PASSED = {"range", "if-match", "if-none-match", "content-type", "content-length"}
"""Headers that both APIs have."""
_ADDED = {
    "host",
    "accept",
    "accept-encoding",
    "user-agent",
    "authorization",
    "transfer-encoding",
    "connection",
}
"""Headers that belong to the connection, or to the way to sign."""
_QUERIES = {
    *("list-type", "prefix", "delimiter", "continuation-token", "max-keys", "start-after"),
    *("uploads", "uploadId", "partNumber"),
}


@contextmanager
def serving(target: str, key: str, secret: str) -> Iterator[str]:
    """Serve the XML API in front of the S3 server at `target` (``host:port``); yield the endpoint."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            path = quote(unquote(parts.path), safe="/~")  # Google's client writes %2F in names
            query = parse_qsl(parts.query, keep_blank_values=True)
            headers, unknown = {}, sorted({name for name, _ in query} - _QUERIES)
            for name, value in self.headers.items():
                if name.lower() in _PASSED:
                    headers[name.lower()] = value
                elif name.lower() == "x-goog-if-generation-match" and value == "0":
                    headers["if-none-match"] = "*"
                elif name.lower() not in _ADDED:
                    unknown.append(f"{name}: {value}")
            if unknown:
                self.answer(501, {}, f"<Error><Code>Unknown</Code>{unknown}</Error>".encode())
                return
            text = "&".join(f"{quote(k, safe='~')}={quote(v, safe='~')}" for k, v in sorted(query))
            signed = _signed(self.command, target, path, text, key, secret)
            connection = http.client.HTTPConnection(target, timeout=60)
            place = f"{path}?{text}" if text else path
            connection.request(self.command, place, body, {**headers, **signed})
            found = connection.getresponse()
            self.answer(found.status, dict(found.getheaders()), found.read())
            connection.close()

        def answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response_only(status)
            dropped = {"transfer-encoding", "connection"}
            kept = {name: value for name, value in headers.items() if name.lower() not in dropped}
            for name, value in {"Content-Length": str(len(data)), **kept}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _signed(method: str, host: str, path: str, query: str, key: str, secret: str) -> dict[str, str]:
    """Return the headers that sign a request whose body is not part of the signature."""
    now, body = datetime.now(UTC), "UNSIGNED-PAYLOAD"
    time, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    headers = {"host": host, "x-amz-content-sha256": body, "x-amz-date": time}
    names = ";".join(sorted(headers))
    listed = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
    canonical = "\n".join((method, path, query, listed, names, body))
    scope = f"{day}/us-east-1/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", time, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    part = f"AWS4{secret}".encode()
    for word in (day, "us-east-1", "s3", "aws4_request"):
        part = hmac.digest(part, word.encode(), "sha256")
    signature = hmac.digest(part, to_sign.encode(), "sha256").hex()
    headers["authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return headers
