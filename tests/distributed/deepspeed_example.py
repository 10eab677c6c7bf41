"""Run examples/deepspeed/train.py as its users do, and report its losses."""

import os
import runpy
import sys

import deepspeed
from tests.distributed.launch import ROOT, report

# DeepSpeed would compile shared-memory collectives for half a minute; gloo has the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
losses = runpy.run_path(str(ROOT / "examples/deepspeed/train.py"))["main"]()
report(losses)
sys.stdout.flush()
os._exit(0)  # its threads have been seen to abort a regular exit
