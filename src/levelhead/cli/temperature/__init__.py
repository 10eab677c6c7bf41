"""`levelhead temperature`: one temperature, fitted on held-out data, in a checkpoint of its own."""

import argparse
from pathlib import Path
from typing import Any

from ..arguments import add_model, add_reading, options_of, set_defaults_of
from ..errors import missing_extra
from .options import Options

_PACKAGES = {"accelerate", "datasets", "jinja2", "peft", "pyarrow", "rich", "transformers"}
_DESCRIPTION = """\
Finds the temperature that makes held-out tokens most likely, and writes a copy of the model
whose logits are divided by it: its confidence is then right on average, and its answers are
those it had. Half of the rows, chosen by --seed, are fitted on; the other half tells what
came of it. Only completions and the turns of the assistant count, and all of a .txt.
"""
_EPILOG = """\
examples:
  levelhead temperature run held-out.jsonl --output calibrated
  levelhead temperature Qwen/Qwen2.5-0.5B text.txt --output calibrated

where the temperature goes (the first that the model allows; summary.json says which):
  logit_scale        a scale in its config (Cohere, Granite)
  head               the weights of a head that is not tied to the embeddings
  final_norm         the weights of the norm before a tied head
  generation_config  sampling alone; nothing else of the model changes

DIR receives the model, its tokenizer and summary.json.
"""


def add_parser(verbs: Any) -> None:
    """Add `temperature` to the verbs of the command."""
    parser = verbs.add_parser(
        "temperature",
        help="calibrate a model with one temperature, fitted on held-out data",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "data",
        metavar="DATA",
        help=".txt, .jsonl or .parquet file that the model was not trained on, or name or folder "
        "of a data set for datasets.load_dataset",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="empty folder for the results"
    )
    add_reading(parser.add_argument_group("reading"))
    set_defaults_of(parser, Options)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fit, write and report.

    Raises:
        CliError: An optional package is missing, or the model or the data cannot be used; nothing
            was written.
    """
    try:
        from .calibrate import calibrate, show
    except ModuleNotFoundError as error:
        raise missing_extra(error, "sft", _PACKAGES) from error
    options = options_of(Options, arguments)
    show(calibrate(options), options.output)
