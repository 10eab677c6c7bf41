"""The command itself: what works without any extra, what it says, and its exit codes."""

import subprocess
import sys
import textwrap

import pytest

import levelhead
from levelhead.cli import demo, main


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"levelhead {levelhead.__version__}\n"


@pytest.mark.parametrize("verb", [[], ["demo"]])
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*verb, "--help"])
    assert exit_.value.code == 0
    assert "  levelhead demo" in capsys.readouterr().out


def test_help_documents_every_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    codes = capsys.readouterr().out.split("exit codes:")[1]
    assert [line.split()[0] for line in codes.strip().splitlines()] == ["0", "2", "130"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "the following arguments are required: VERB"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--smoothing", "2"], "must be a number in [0, 1], got '2'"),
        (["demo", "--smoothing", "some"], "must be a number in [0, 1], got 'some'"),
        (["demo", "--seeds", "0"], "must be a whole number from 1 on, got '0'"),
        (["demo", "--seeds", "-3"], "must be a whole number from 1 on, got '-3'"),
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


@pytest.mark.parametrize("package", ["rich", "matplotlib", "transformers"])
def test_a_missing_extra_says_how_to_install_it(package):
    code = f"""
        import sys
        sys.modules[{package!r}] = None  # importing it now fails as if it were not installed
        from levelhead.cli import main
        sys.exit(main(["demo"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"levelhead demo: error: this needs {package}, which is not installed; "
        "run: pip install 'levelhead[demo]'\n"
    )


def test_help_and_version_import_no_extra():
    code = """
        import sys
        for package in ("rich", "matplotlib", "transformers"):
            sys.modules[package] = None
        from levelhead.cli import main
        for arguments in (["--version"], ["--help"], ["demo", "--help"]):
            try:
                main(arguments)
            except SystemExit as exit_:
                assert exit_.code == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=True)
