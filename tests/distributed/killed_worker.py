"""Kills the last rank at a bad moment: in a step, or in the main process while it saves.

Arguments: "DDP" or "FSDP2" for a step, or those of examples/accelerate/train.py.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tests.distributed import ddp_worker, fsdp_worker
from tests.distributed.launch import ROOT, TIMEOUT, report
from tests.distributed.problem import batches, optimizer, train
from torch.nn.parallel import DistributedDataParallel


def die(*_arguments: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def step(kind: str) -> None:
    """The last rank dies in the forward pass of its second step, the first says what it sees."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    # torchrun ends the rank that is left. This one waits for the error that a step must raise.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    inner = ddp_worker.patched()
    model = DistributedDataParallel(inner) if kind == "DDP" else fsdp_worker.head2(inner)
    descend = optimizer(model)
    train(descend, batches()[:1], lambda batch: ddp_worker.loss_of(model, batch))
    if dist.get_rank() == 1:
        inner.model.layers[1].register_forward_hook(die)
    try:
        train(descend, batches()[1:], lambda batch: ddp_worker.loss_of(model, batch))
    except RuntimeError as error:
        report(f"{type(error).__name__}: {error}")
        os._exit(1)
    report("all steps done")


def saving() -> None:
    """The main process dies over the second checkpoint, with half of the weights on the disk."""
    from accelerate import Accelerator

    save_state = Accelerator.save_state

    def save_half(self: Accelerator, folder: str) -> None:
        save_state(self, folder)
        if list(Path(folder).parent.glob("step-*")) and self.is_main_process:
            weights = Path(folder, "model.safetensors")
            os.truncate(weights, weights.stat().st_size // 2)
            die()

    Accelerator.save_state = save_half
    runpy.run_path(str(ROOT / "examples/accelerate/train.py"), run_name="__main__")


if __name__ == "__main__":
    step(sys.argv[1]) if sys.argv[1] in ("DDP", "FSDP2") else saving()
