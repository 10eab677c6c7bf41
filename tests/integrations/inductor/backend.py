"""A backend that runs the pass and then PyTorch's own kernels: all that Inductor does but for the code it generates."""

from typing import Any

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import levelhead


def pass_only(**options: Any) -> Any:
    """Return a backend for torch.compile, with the options of levelhead.inductor_options."""
    fuse = levelhead.inductor_options(**options)["pre_grad_custom_pass"]

    def compile_(graph_module: GraphModule, inputs: list[Any]) -> Any:
        fuse(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        as_it_is = aot_autograd(fw_compiler=lambda g, _: make_boxed_func(g.forward))
        return as_it_is(graph_module, inputs)

    return compile_
