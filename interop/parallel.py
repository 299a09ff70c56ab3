"""Several processes (torchrun, FSDP2): who am I, what is my part, sums and shards over all. With one process every function here
does nothing. Imports nothing of this project; any file may import it.
"""
import contextlib
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

try:
    import fcntl
except ImportError:     # Windows has no such locks
    fcntl = None


def join_processes():
    """Meet the other processes that torchrun started; only the first talks."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
            sys.stderr.isatty = lambda: False           # tqdm draws no bars then


def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_items(items):
    """This process's part of a list."""
    return items[rank()::ranks()]


def even(items):
    """As many of the first items as the processes can share evenly."""
    return items[:len(items) - len(items) % ranks()]


def total(t):
    """The sum of a tensor over all processes."""
    if ranks() > 1:
        t = t.clone()
        dist.all_reduce(t)
    return t


def gather(items):
    """The lists of all processes as one, the same in each."""
    if ranks() > 1:
        found = [None] * ranks()
        dist.all_gather_object(found, items)
        items = [item for part in found for item in part]
    return items


def once(work, *args):
    """The first process does work(*args); no process goes on before that is done."""
    if rank() == 0:
        work(*args)
    total(torch.zeros(1))


@functools.cache
def mesh(device):
    """All processes in one row, which share every tensor; made once for each device."""
    return init_device_mesh(torch.device(device).type, (ranks(),))


def shard(net, device):
    """Split every parameter over the processes by its rows (FSDP2): a block's are gathered when it computes, those outside
    the blocks, such as embedding and heads, for the length of a step; gradients come out as means over the processes."""
    if ranks() > 1:
        for module in [*getattr(net, "layers", ()), net]:
            fully_shard(module, mesh=mesh(device))
    return net


def placed(t, device):
    """t on a device; of several processes each keeps its shard of the rows."""
    if ranks() == 1:
        return t.to(device)
    return distribute_tensor(t.to(device), mesh(device), [Shard(0)], src_data_rank=None).clone()     # lets go of the whole


def whole(t):
    """A tensor of which every process may hold a shard, in full."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gathered(p):
    """A parameter to be saved: where it is sharded, in full in the first process's main memory, and nowhere else."""
    if not isinstance(p, DTensor):
        return p.detach()
    return whole(p.detach()).to("cpu" if rank() == 0 else "meta")


def like(t, other):
    """t on the device of `other`, and sharded as that is."""
    return placed(t, other.device) if isinstance(other, DTensor) else t.to(other.device)


def reaching(loss, parameters):
    """A loss that has a gradient, of 0 perhaps, for all of these parameters: FSDP wants it for the
    same parameters in every process."""
    if ranks() > 1:
        loss = loss + 0 * sum(p[0, 0] for p in parameters)
    return loss


def head_norm(head):
    """The norm of a head's gradient over all processes, divided by their number: the processes'
    sum is the norm. 0 where it has none."""
    grad = head.weight.grad
    if grad is None:
        return torch.zeros((), device=head.weight.device)
    return whole(grad.norm()) / ranks()


def parameters_of(optimizer):
    """The parameters that an optimiser updates, in a fixed order."""
    return sum([group["params"] for group in optimizer.param_groups], [])


@contextlib.contextmanager
def alone(path):
    """Hold a directory. OSError if another command holds it, say the processes that go on after
    their torchrun was killed: two would write the same files."""
    with contextlib.ExitStack() as stack:
        if fcntl and rank() == 0:
            directory = os.open(path, os.O_RDONLY)
            stack.callback(os.close, directory)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{path}: a train.py is at work there already; wait for it, or end "
                              "its processes") from None
            except OSError:                     # a file system without locks
                pass
        yield
