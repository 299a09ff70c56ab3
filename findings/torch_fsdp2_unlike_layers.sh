#!/bin/bash
# torch 2.13.0 (CPU, gloo, two processes)
# Two layers of one shape are one unit of fully_shard (FSDP2).  In the same step one process uses
# the first layer, the other process the second, as two processes do whose batches belong to
# different heads.  No error: each process puts the gradients that it has one behind the other, the
# buffers happen to be of one length, and the gradient of layer a is averaged with that of layer b.
# Expected: each layer the mean of its own gradient and of 0 (a .5, b 5), or an error.
# Seen: both layers get (1 + 10) / 2 = 5.5, and each in one process alone, where the other has None:
#   process 0: a [5.5] b None
#   process 1: a None b [5.5]
set -eu
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
cd "$T"
cat > unlike.py <<'END'
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(1, 2, bias=False)
        self.b = nn.Linear(1, 2, bias=False)

    def forward(self, x, name):
        return getattr(self, name)(x)


def work(rank, found):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method="file://./meet")
    model = Two()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    name, x = [("a", 1.0), ("b", 10.0)][rank]
    model(torch.tensor([[x]]), name).sum().backward()
    grads = {}
    for layer in ("a", "b"):
        g = getattr(model, layer).weight.grad
        grads[layer] = None if g is None else g.to_local().flatten().tolist()
    found[rank] = grads
    dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(work, (found,), nprocs=2)
        for rank in (0, 1):
            print(f"process {rank}: a {found[rank]['a']} b {found[rank]['b']}")
        assert found[0] == {"a": [5.5], "b": None} and found[1] == {"a": None, "b": [5.5]}
END
OMP_NUM_THREADS=1 "$T/venv/bin/python" -W ignore unlike.py
