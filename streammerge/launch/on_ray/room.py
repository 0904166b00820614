"""What the actors of a merge may use of a cluster: how many there are, and the CPUs, memory and GPU of each. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streammerge.errors import InputError
from streammerge.launch.base import Needs
from streammerge.records import dataclass
from streammerge.units import format_size, plural

Node = Mapping[str, float]
"""The resources of one node: ``CPU``, ``memory`` in bytes, ``GPU``."""


@dataclass(frozen=True)
class Room:
    """The actors of a merge."""

    count: int
    threads: int
    memory: int
    """Bytes of ``--memory`` of each."""
    gpu: bool
    """Whether each has a GPU."""
    fit: int
    """Number of actors that the nodes of the cluster have room for, if nothing else runs there."""
    counted: bool = True
    """Whether the nodes announce memory, so that Ray can count it."""

    @property
    def resources(self) -> dict[str, float]:
        """The options of an actor."""
        memory = self.memory if self.counted else 0
        return {"num_cpus": self.threads, "memory": memory, "num_gpus": int(self.gpu)}

    @property
    def each(self) -> str:
        """What an actor takes, in words."""
        gpu = " and 1 GPU" if self.gpu else ""
        return f"{plural(self.threads, 'CPU')}{',' if gpu else ' and'} {format_size(self.memory)}{gpu}"

    @property
    def options(self) -> list[str]:
        """The options of ``merge`` of each engine."""
        return [
            "--threads",
            str(self.threads),
            "--memory",
            str(self.memory),
            *(["--device", "cuda" if self.gpu else "cpu"]),
        ]


def room_for(needs: Needs, nodes: Sequence[Node]) -> Room:
    """Return how a merge is spread over the nodes.

    Without a number there is one actor for each node, or for each GPU. What is not given is the share of an actor of the
    smallest node that has CPUs.

    Raises
    ------
    InputError
        If no node has room for one actor, or if the nodes do not say how much memory they give.
    """
    nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
    if not nodes:
        raise InputError("--on ray: the cluster has no node with a CPU to give: add one")
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if needs.device.startswith("cuda:"):
        raise InputError(f"--device {needs.device} with --on ray: Ray chooses the GPU: give --device cuda")
    gpu = needs.device == "cuda"  # `auto` takes no GPU from others on the cluster that may need it more
    if gpu and not gpus:
        raise InputError("--device cuda with --on ray: no node of the cluster has a GPU")
    if gpu:
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
    count = needs.count or (gpus if gpu else len(nodes))
    each = -(-count // len(nodes))
    threads = needs.threads or max(1, int(min(node["CPU"] for node in nodes)) // each)
    memory = needs.memory or int(min(node.get("memory", 0) for node in nodes)) // each
    if not memory:
        raise InputError("--on ray: a node of the cluster announces no memory for Ray to give: give --memory")
    counted = any(node.get("memory", 0) for node in nodes)
    fit = sum(_fitting(node, threads, memory if counted else 0, gpu) for node in nodes)
    if not fit:
        cpus, largest = max(node["CPU"] for node in nodes), max(node.get("memory", 0) for node in nodes)
        raise InputError(
            f"--on ray: no node of the cluster has {plural(threads, 'CPU')} and {format_size(memory)} of memory for Ray to "
            f"give; the most are {int(cpus)} and {format_size(int(largest))}: less --threads or --memory"
        )
    return Room(count, threads, memory, gpu, fit, counted)


def _fitting(node: Node, threads: int, memory: int, gpu: bool) -> int:
    found = [node["CPU"] // threads]
    if memory:
        found.append(node.get("memory", 0) // memory)
    return int(min(found + ([node.get("GPU", 0)] if gpu else [])))
