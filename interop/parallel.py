"""Several processes (torchrun, FSDP2): who am I, what is my part, sums and shards over all.

    join_processes, leave_processes   at the start: meet the others; at the end: part from them
    local_items, total, gather, once  what each does alone, and what all know afterwards
    in_threads                        what one process does on several threads
    shard, placed, whole, gathered    parameters of which every process holds some rows
    whole_file, alone                 a file that appears whole, a directory held by one command

With one process the functions of lines one, two and four do nothing. Imports nothing of this
project; any file may import it.
"""
import contextlib
import functools
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist


def join_processes():
    """Meet the other processes that torchrun started; only the first talks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    # Tensors go through gloo in main memory, through nccl between GPUs, one GPU for each process.
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
        # tqdm draws progress bars for a terminal only; bool() is False.
        sys.stderr.isatty = bool


def leave_processes():
    """Part from the others when all have come to the end. torch's threads end here: while they
    live, the interpreter's own end may abort the process."""
    if dist.is_initialized():
        dist.barrier()
        mesh.cache_clear()
        dist.destroy_process_group()
        sys.stdout.flush()


def first_speaks():
    """Before a message that all processes have: the others wait to be ended by torchrun, because
    the first has ended."""
    if rank() > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)


# -- who am I

def rank():
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


# -- work that is shared out

def local_items(items):
    """This process's part of a list: every ranks()-th item."""
    return items[rank()::ranks()]


def even(items):
    """As many of the first items as the processes can share evenly."""
    return items[:len(items) - len(items) % ranks()]


def total(t):
    """The sum of a tensor over all processes."""
    if ranks() > 1:
        # The caller's own tensor stays as it is.
        t = t.clone()
        dist.all_reduce(t)
    return t


def gather(items):
    """The lists of all processes as one, the same in each."""
    parts = [items] * ranks()
    if ranks() > 1:
        dist.all_gather_object(parts, items)
    return sum(parts, [])


def in_threads(work, items, alone):
    """Yield work(item) for every item, in order. Small products gain little from a second thread,
    so instead as many items as torch has threads, up to four, are worked on at once, on a thread
    each. alone: one after another, as for large models, of which only one may be in memory."""
    n = torch.get_num_threads()
    if alone or n == 1:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(min(n, 4), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(work, items)
    finally:
        # After an error or a stop, what has not begun is not begun.
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n)


def once(work, *args):
    """The first process does work(*args); no process goes on before that is done."""
    if rank() == 0:
        work(*args)
    total(torch.zeros(1))


@contextlib.contextmanager
def whole_file(path):
    """A file to write bytes to. Whatever happens, `path` is the old file or the whole new one: the
    bytes stand under another name until all are on the disk. The first process writes; no process
    goes on before the file is there. OSError, say, on a full disk."""
    temporary = f"{path}.tmp"
    # No process has the sum before all have come: none still reads what stood there.
    total(torch.zeros(1))
    try:
        with open(temporary if rank() == 0 else os.devnull, "wb") as f:
            yield f
            if rank() == 0:
                f.flush()
                os.fsync(f.fileno())
        once(os.replace, temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise OSError(f"{path}: cannot be written ({e.strerror}); what stood there is intact. Make "
                      "room, or get the right to write there, and run the command again, train.py "
                      "with --resume") from None


# -- parameters that are shared out

@functools.cache
def mesh(device):
    """All processes in one row, which share every tensor; made once for each device."""
    return dist.device_mesh.init_device_mesh(torch.device(device).type, (ranks(),))


def shard(net, device):
    """Split every parameter over the processes by its rows (FSDP2). -> net

    A block's parameters are gathered when it computes; those outside the blocks, such as embedding
    and heads, for the length of a step. Gradients come out as means over the processes."""
    if ranks() > 1:
        from torch.distributed.fsdp import fully_shard   # here, because its import takes a second
        # First the blocks, each a unit of its own, then the rest.
        for module in [*getattr(net, "layers", ()), net]:
            fully_shard(module, mesh=mesh(device))
    return net


def placed(t, device):
    """t on a device; of several processes each keeps its shard of the rows."""
    t = t.to(device)
    if ranks() == 1:
        return t
    from torch.distributed.tensor import Shard, distribute_tensor
    part = distribute_tensor(t, mesh(device), [Shard(0)], src_data_rank=None)
    # The shard is a view of the whole tensor, which a copy lets go.
    return part.clone()


def is_sharded(t):
    """Is it a DTensor, of which every process holds a shard?"""
    return hasattr(t, "full_tensor")


def whole(t):
    """A tensor of which every process may hold a shard, in full."""
    return t.full_tensor() if is_sharded(t) else t


def gathered(p):
    """A parameter to be saved: where it is sharded, in full in the first process's main memory, and
    nowhere else."""
    p = p.detach()
    if not is_sharded(p):
        return p
    # All processes take part in gathering; the others keep the shape alone.
    return whole(p).to("cpu" if rank() == 0 else "meta")


def like(t, other):
    """t on the device of `other`, and sharded as that is."""
    if is_sharded(other):
        return placed(t, other.device)
    return t.to(other.device)


def inner_products(gradients):
    """A list of tensors for each of H objectives, of the same parameters -> (H, H) in float64 on
    the CPU, their inner products over all parameters and all processes."""
    found = 0
    for own in zip(*gradients):
        # Of a parameter that is shared out, every process adds the products of its rows.
        rows = [g.to_local() if is_sharded(g) else g for g in own]
        flat = torch.stack(rows).flatten(1)                                 # (H, numbers)
        found = found + (flat @ flat.T).double()
    return total(found).cpu()


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
        try:
            if rank() == 0:
                import fcntl
                directory = os.open(path, os.O_RDONLY)
                stack.callback(os.close, directory)
                # The lock is the system's own: it ends with the process, however that ends.
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{path}: a train.py is at work there already; wait for it, or end its "
                          "processes") from None
        except (ImportError, OSError):      # Windows, or a file system, without such locks
            pass
        yield
