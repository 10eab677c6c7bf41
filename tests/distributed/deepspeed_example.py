"""Run examples/deepspeed/train.py as its users do, and report its losses."""

import os
import runpy
import sys

import deepspeed
from tests.distributed.launch import ROOT, report
from tests.distributed.problem import without_shared_memory

without_shared_memory(deepspeed)
losses = runpy.run_path(str(ROOT / "examples/deepspeed/train.py"))["main"]()
report(losses)
sys.stdout.flush()
os._exit(0)  # its threads have been seen to abort a regular exit
