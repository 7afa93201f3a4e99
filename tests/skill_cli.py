"""``past-ray skill`` called in this process, in a folder with two vectors and two targets."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from past_ray.cli import app
from tests.skill_models import SMALL, make_model, make_skill


@pytest.fixture(name="made", scope="module")
def made_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two vectors with their parents, and two targets; no test changes them."""
    folder = tmp_path_factory.mktemp("made")
    make_skill(folder / "v1", seed=1, shapes=SMALL)
    make_skill(folder / "v2", seed=2, shapes=SMALL)
    make_model(folder / "t1", seed=3, shapes=SMALL)
    make_model(folder / "t2", seed=4, shapes=SMALL)
    return folder


@pytest.fixture(name="here")
def here_fixture(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of them, so that commands read as in the README."""
    for entry in made.iterdir():
        shutil.copytree(entry, tmp_path / entry.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> Result:
    """Run a command of ``past-ray skill``."""
    return CliRunner().invoke(app, ["skill", *map(str, arguments)])


def ok(*arguments: object) -> Result:
    """Run a command that must succeed."""
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    return done


def refused(*arguments: object) -> str:
    """The one line that a user sees; nothing else may be shown and nothing raised."""
    done = run(*arguments)
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == 1
    assert "Traceback" not in done.output
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    return line
