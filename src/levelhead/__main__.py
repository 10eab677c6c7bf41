"""`python -m levelhead`: the command, in a form that accelerate and deepspeed can launch."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
