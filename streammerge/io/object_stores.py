"""Open a bucket with obstore; credentials come from the environment alone, by obstore's own chain."""

from __future__ import annotations

import importlib
import ipaddress
import os
import threading
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from streammerge.errors import InputError, printable

INSECURE = "STREAMMERGE_INSECURE_ENDPOINT"
"""Variable of the environment, set by ``--insecure-endpoint``: an endpoint may be plain HTTP and not on this machine."""
_CLASSES = {"s3": "S3Store", "gs": "GCSStore", "az": "AzureStore"}
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""Variables of the environment that name an endpoint, the first that is set wins."""
CLIENT: dict[str, Any] = {
    # A stalled answer is given up; a slow one is not, however many share the line.
    "timeout": timedelta(minutes=10),
    "read_timeout": timedelta(seconds=60),
    "connect_timeout": timedelta(seconds=10),
}
QUICK: dict[str, Any] = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
}
"""How the library repeats a request, for a second or two; `object_waiting.Patience` repeats it for minutes."""
PATIENT: dict[str, Any] = {
    "max_retries": 60,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
"""How the library repeats what it sends of an upload, which nobody else can repeat."""
_STORES: dict[tuple[str, str, bool], Any] = {}
_LOCK = threading.Lock()


def library(scheme: str) -> Any:
    """Return obstore.

    Raises
    ------
    InputError
        If it is not installed.
    """
    if find_spec("obstore") is None:
        raise InputError(
            f"{scheme}:// is read and written by obstore, which is not installed: install it with "
            "`pip install 'streammerge[objects]'`"
        )
    return importlib.import_module("obstore")


def split_url(url: str) -> tuple[str, str, str]:
    """Return scheme, bucket and key of a URL."""
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    return scheme, bucket, key.strip("/")


def store_of(url: str, *, patient: bool = False) -> tuple[Any, str]:
    """Return the store of a URL's bucket, and the URL's key in it.

    Parameters
    ----------
    patient
        Whether the library repeats failed requests for minutes; an upload in parts needs it.

    Raises
    ------
    InputError
        If obstore is missing, or the endpoint is not safe.
    """
    scheme, bucket, key = split_url(url)
    with _LOCK:
        if (scheme, bucket, patient) not in _STORES:
            library(scheme)
            plain = _is_plain(scheme, os.environ)
            stores = importlib.import_module("obstore.store")
            try:
                _STORES[scheme, bucket, patient] = getattr(stores, _CLASSES[scheme])(
                    bucket,
                    client_options={**CLIENT, "allow_http": plain},
                    retry_config=PATIENT if patient else QUICK,
                )
            except Exception as error:  # obstore's exceptions share no base with its checks of settings
                raise InputError(
                    f"{scheme}://{printable(bucket, 80)}: obstore refuses the environment's settings "
                    f"({type(error).__name__}): check the variables of this store"
                ) from None
        return _STORES[scheme, bucket, patient], key


def e_tag_of(meta: Mapping[str, Any]) -> str:
    """Return an object's ETag in the form that requests carry; lists of some stores leave the quotes out.

    >>> e_tag_of({"e_tag": "0x8D"}), e_tag_of({"e_tag": '"0x8D"'}), e_tag_of({"e_tag": None})
    ('"0x8D"', '"0x8D"', '')
    """
    found = meta["e_tag"] or ""
    return f'"{found}"' if found and not found.endswith('"') else found


def close_stores() -> None:
    """Forget the opened buckets, so that a changed environment counts."""
    with _LOCK:
        _STORES.clear()


def _is_plain(scheme: str, environment: Mapping[str, str]) -> bool:
    """Return whether the endpoint speaks plain HTTP; refuse one that is not on this machine.

    Raises
    ------
    InputError
        If it is refused, or is no address.
    """
    name = _endpoint_name(scheme, environment)
    if name is None:
        return False
    try:
        parts = urlsplit(environment[name])
        host, secret = parts.hostname or "", parts.username is not None or bool(parts.query)
    except ValueError:
        host, secret = "", False
    if not host or parts.scheme not in ("http", "https") or secret:
        raise InputError(
            f"{name} (not shown) is not an address: write https://HOST or https://HOST:PORT alone"
        )
    if parts.scheme == "http" and not is_loopback(host) and not environment.get(INSECURE):
        raise InputError(
            f"{name} is plain HTTP to {printable(host, 80)}, where anyone on the way can read and change what is merged: "
            "use https, or give --insecure-endpoint if the network is your own"
        )
    return parts.scheme == "http"


def endpoint_of(scheme: str, environment: Mapping[str, str]) -> str | None:
    """Return the endpoint that the environment names."""
    name = _endpoint_name(scheme, environment)
    return None if name is None else environment[name]


def _endpoint_name(scheme: str, environment: Mapping[str, str]) -> str | None:
    return next((name for name in _ENDPOINTS[scheme] if environment.get(name)), None)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
