"""Benchmarks: each measures into results/, from which `python -m benchmarks.render` makes tables and figures.

What is run:

- `python -m benchmarks` (`make bench`): all that a user could pick, on a CPU; `training.py` is its whole-model part
- `gpu` (`make gpu`): four stages on a GPU: `decide`, `gpu_tests`, `gpu_bench`, `tune`
- `boundary`: what a call costs around its products; `compile`: graphs, breaks and recompilations
- any other with a `main`: one question about a method, in its own docstring

What it is made of, from the inside out:

- `shapes`: heads of models; `methods`: what is compared
- `step`: a method on a case, its memory, the machine; `gate`: whether its result is right
- `stage`: tasks under a clock; `measure`: rows, by turns; `targets`: verdicts on them
- `costs`, `figures`: tables and pictures of time, memory and error; `render`: all blocks of the pages
"""
