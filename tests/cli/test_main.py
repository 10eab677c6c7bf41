"""The command itself: what works without any extra, what it says, and its exit codes."""

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


@pytest.mark.parametrize(
    ("verb", "package", "extra"),
    [
        (["demo"], "rich", "demo"),
        (["demo"], "matplotlib", "demo"),
        (["demo"], "transformers", "demo"),
        (["sft", "tiny", "d.jsonl", "--output", "o"], "datasets", "sft"),
        (["report", "a.csv", "--json"], "pyarrow", "report"),
        (["report", "a.csv"], "matplotlib", "report"),
        (["doctor"], "rich", "cli"),
    ],
)
def test_a_missing_extra_says_how_to_install_it(verb, package, extra):
    code = f"""
        import sys
        sys.modules[{package!r}] = None  # importing it now fails as if it were not installed
        from levelhead.cli import main
        sys.exit(main({verb!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"levelhead {verb[0]}: error: this needs {package}, which is not installed; "
        f"run: pip install 'levelhead[{extra}]'\n"
    )


def test_help_and_version_import_no_extra():
    code = """
        import sys
        for package in ("rich", "matplotlib", "transformers", "datasets", "peft", "pyarrow"):
            sys.modules[package] = None
        from levelhead.cli import main
        for arguments in (
            ["--version"], ["--help"], ["demo", "--help"], ["sft", "--help"], ["doctor", "--help"],
            ["report", "--help"],
        ):
            try:
                main(arguments)
            except SystemExit as exit_:
                assert exit_.code == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=True)
