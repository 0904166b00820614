"""The connection to a Ray cluster: the one that ``RAY_ADDRESS`` names, or one that is started here for the merge alone."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError

from streammerge.errors import InputError, WorldError, printable
from streammerge.launch.base import Needs
from streammerge.machine import available_memory

_STORE_NBYTES = 80 << 20
"""Size of the object store of a cluster of our own; no tensor travels through it."""
_KNOCK_SECONDS = 10.0
_LOOPBACK = ("127.", "localhost", "[::1]", "auto", "local")


@contextlib.contextmanager
def connect(needs: Needs, tell: Callable[[Mapping[str, Any]], None]) -> Iterator[list[dict[str, float]]]:
    """Connect to a cluster, or start one; yield the resources of its nodes.

    Raises
    ------
    InputError
        If the cluster cannot be used as it is: a client's address, other versions, no token.
    WorldError
        If it does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise InputError(
            f"RAY_ADDRESS {printable(address)}: --on ray does not go through Ray's client: run it on a node of the cluster "
            "with RAY_ADDRESS=auto, or by `ray job submit`"
        )
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    how = {"address": address, **common} if address else _own(needs, common)
    if not address:
        tell(
            {
                "event": "warning",
                "message": "RAY_ADDRESS is not set: Ray is started here, for this merge alone",
            }
        )
    try:
        _knock(address)
    except (OSError, OverflowError) as error:
        raise WorldError(_unreachable(address, error)) from None
    try:
        ray.init(**how)
    except AuthenticationError:
        raise InputError(
            "the Ray cluster asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from None
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise WorldError(_unreachable(address, error)) from None
        told = " ".join(str(error).split())
        raise InputError(f"{printable(told, 400)}: install the same versions here and on all nodes") from None
    except (ConnectionError, RayError, ValueError, OSError) as error:
        raise WorldError(_unreachable(address, error)) from None
    if os.environ.get("RAY_AUTH_MODE") != "token" and not address.startswith(_LOOPBACK):  # Ray sets it too
        message = "this Ray cluster asks for no token: who reaches its ports can run code on all its nodes; see RAY_AUTH_MODE in the docs"
        tell({"event": "warning", "message": message})
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at ``host:port``, or OverflowError if there is no such port; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()


def _unreachable(address: str, error: Exception) -> str:
    told = printable((str(error).splitlines() or [type(error).__name__])[0], 300)
    return f"Ray at {printable(address) or 'this host'} does not answer ({told}): is it running, and RAY_ADDRESS right?"


def _own(needs: Needs, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a cluster of our own is started: on this host, behind a token; see `streammerge.launch.launchers.ray`."""
    count = needs.count or 1
    cpus = len(os.sched_getaffinity(0))
    threads = needs.threads or max(1, cpus // count)
    memory = needs.memory or available_memory() // 2 // count
    return {
        "address": "local",
        "num_cpus": count * threads,
        "_memory": count * memory,
        "object_store_memory": _STORE_NBYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        **common,
    }
