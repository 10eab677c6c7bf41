"""New processes that import nothing: forks of one that has imported what the tests need, and has computed nothing."""

import multiprocessing
from multiprocessing.context import ForkServerContext

MODELS = ("llama", "gemma2", "mixtral", "gpt2")


def context() -> ForkServerContext:
    """For `ProcessPoolExecutor` and for processes; all that a test session starts fork from the same one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "levelhead.integrations.accelerate",
            "torch._inductor.compile_fx",
            "torch.distributed.fsdp",
            "torch.distributed.tensor.parallel",
            "transformers.trainer",
            *(f"transformers.models.{name}.modeling_{name}" for name in MODELS),
        ]
    )
    return context
