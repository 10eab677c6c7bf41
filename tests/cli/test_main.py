"""The command itself: what works without any extra, what it says, and its exit codes."""

import json
import subprocess
import sys
import textwrap

import pytest

import levelhead
from levelhead.cli import demo, main
from levelhead.cli.errors import CliError


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"levelhead {levelhead.__version__}\n"


@pytest.mark.parametrize("verb", ["demo", "sft", "score", "report", "doctor"])
def test_help_has_an_example(verb, capsys):
    for arguments in (["--help"], [verb, "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert f"  levelhead {verb}" in capsys.readouterr().out


def test_help_documents_every_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    codes = capsys.readouterr().out.split("exit codes:")[1]
    assert [line.split()[0] for line in codes.strip().splitlines()] == ["0", "1", "2", "130"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: VERB"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--smoothing", "2"], "must be a number in [0, 1], got '2'"),
        (["demo", "--smoothing", "some"], "must be a number in [0, 1], got 'some'"),
        (["demo", "--seeds", "0"], "must be a whole number from 1 on, got '0'"),
        (["report"], "the following arguments are required: FILE"),
        (["report", "a.csv", "--where", "model"], "must be COLUMN=VALUE, got 'model'"),
        (["demo", "--seeds", "-3"], "must be a whole number from 1 on, got '-3'"),
        (["sft", "tiny", "d.jsonl"], "the following arguments are required: --output"),
        (["sft", "tiny", "d.jsonl", "--temperature", "0"], "must be a number above 0, got '0'"),
        (["sft", "tiny", "d.jsonl", "--softcap", "inf"], "must be a number above 0, got 'inf'"),
        (
            ["sft", "tiny", "d.jsonl", "--epochs", "1", "--max-steps", "1"],
            "argument --max-steps: not allowed with argument --epochs",
        ),
    ],
)
def test_wrong_arguments_exit_with_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert text in capsys.readouterr().err


def test_interruption_exits_with_130(monkeypatch, capsys):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "levelhead demo: interrupted\n"


def test_of_several_processes_one_prints(monkeypatch, capsys):
    def fail(*_arguments):
        raise CliError("no")

    monkeypatch.setattr(demo, "run", fail)
    monkeypatch.setenv("RANK", "1")
    # As the launcher of DeepSpeed calls it.
    assert main(["--local_rank=1", "demo"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["--local_rank=0", "demo"]) == 2
    assert capsys.readouterr().err == "levelhead demo: error: no\n"


# Each run is a fork of a process that has imported the command, and none of the packages.
_RUNS = """
    import contextlib, io, json, os, sys
    from levelhead.cli import main
    for packages, arguments in json.loads(sys.argv[1]):
        if os.fork() == 0:
            for package in packages:  # importing it now fails as if it were not installed
                sys.modules[package] = None
            with contextlib.redirect_stderr(io.StringIO()) as said:
                with contextlib.redirect_stdout(io.StringIO()):
                    try:
                        code = main(arguments)
                    except SystemExit as exit_:
                        code = exit_.code
            print(json.dumps([code, said.getvalue()]), flush=True)
            os._exit(0)
        os.wait()
"""
EXTRAS = [
    (["demo"], "rich", "demo"),
    (["demo"], "matplotlib", "demo"),
    (["demo"], "transformers", "demo"),
    (["sft", "tiny", "d.jsonl", "--output", "o"], "datasets", "sft"),
    (["report", "a.csv", "--json"], "pyarrow", "report"),
    (["report", "a.csv"], "matplotlib", "report"),
    (["doctor"], "rich", "cli"),
]
HELP = [
    ["--version"],
    ["--help"],
    *([verb, "--help"] for verb in ("demo", "sft", "doctor", "report")),
]
ALL_EXTRAS = ["rich", "matplotlib", "transformers", "datasets", "peft", "pyarrow"]
OTHERS = ["transformers", "accelerate", "peft", "datasets", "matplotlib"]


@pytest.fixture(scope="module")
def without():
    """Exit code and stderr of commands, by the words of them and the packages that they are without."""
    runs = [([package], verb) for verb, package, _ in EXTRAS]
    runs += [(ALL_EXTRAS, arguments) for arguments in HELP] + [(OTHERS, ["doctor"])]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_RUNS), json.dumps(runs)],
        capture_output=True,
        text=True,
        check=True,
    )
    said = map(json.loads, done.stdout.splitlines())
    return {(*verb, *packages): found for (packages, verb), found in zip(runs, said, strict=True)}


@pytest.mark.parametrize(("verb", "package", "extra"), EXTRAS)
def test_a_missing_extra_says_how_to_install_it(without, verb, package, extra):
    assert without[*verb, package] == [
        2,
        f"levelhead {verb[0]}: error: this needs {package}, which is not installed; "
        f"run: pip install 'levelhead[{extra}]'\n",
    ]


@pytest.mark.parametrize("arguments", HELP)
def test_help_and_version_import_no_extra(without, arguments):
    assert without[*arguments, *ALL_EXTRAS] == [0, ""]


def test_doctor_needs_nothing_but_rich(without):
    assert without["doctor", *OTHERS] == [0, ""]
