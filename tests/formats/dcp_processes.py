"""Checkpoints that torch.distributed.checkpoint itself writes, from two processes over loopback.

    python -m tests.formats.dcp_processes DIRECTORY

DIRECTORY gets ``two`` (torch.save) and ``two-safetensors``, of `FULL` sharded as `PLACES` says, and ``full.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, tuple[int, ...]] = {
    "model.rows": (7, 6),
    "model.columns": (6, 9),
    "model.middle": (3, 5, 4),
    "model.few": (1, 4),
    "model.all": (5,),
    "model.vector": (9,),
}
PLACES = {
    "model.rows": 0,
    "model.columns": 1,
    "model.middle": 1,
    "model.few": 0,
    "model.all": None,
    "model.vector": 0,
}
"""The axis along which the processes share each; None: both have all of it."""


def full() -> dict[str, torch.Tensor]:
    """Return the tensors, whole."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return tensors | {"model.columns": tensors["model.columns"].bfloat16()}


def save(rank: int, directory: Path) -> None:
    """Write the checkpoints, as one of the two processes."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded: dict[str, Any] = {}
    for name, tensor in full().items():
        axis = PLACES[name]
        sharded[name] = distribute_tensor(tensor, mesh, [Replicate() if axis is None else Shard(axis)])
    moments = distribute_tensor(torch.zeros(7, 6), mesh, [Shard(0)])
    more = {"optimizer.state.model.rows.exp_avg": moments, "optimizer.param_groups.0.lr": 1e-3, "step": 3}
    dcp.save({**sharded, **more}, checkpoint_id=directory / "two")
    writer = FileSystemWriter(
        directory / "two-safetensors", serialization_format=SerializationFormat.SAFETENSORS
    )
    dcp.save(sharded, storage_writer=writer)
    dist.destroy_process_group()


def main(directory: Path) -> None:
    """Fork the other process, so that torch is imported once, and be the first one."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    number = os.fork()
    save(int(number == 0), directory)
    if number == 0:
        os._exit(0)
    assert os.waitpid(number, 0)[1] == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
