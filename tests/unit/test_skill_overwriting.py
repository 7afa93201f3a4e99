"""Results never replace what they are made of, nor anything else of value."""

import pytest

from past_ray.errors import SkillVectorError, StorageError
from past_ray.locations import open_folder
from past_ray.skill import extract, inject, sweep
from tests.skill_folders import contents, names, write_json
from tests.skill_refusals import (
    folder_fixture,  # noqa: F401
    refusal,
)


@pytest.mark.parametrize("role", ["rl", "sft", "base"])
def test_a_vector_is_never_written_over_a_model_it_is_made_from(folder, role):
    before = contents(folder / role)
    message = refusal(extract, folder / "rl", folder / "sft", folder / role, base=folder / "base")
    assert str(folder / role) in message
    assert contents(folder / role) == before


def test_a_vector_is_never_written_over_the_previous_rounds(folder):
    before = contents(folder / "skill")
    with pytest.raises(SkillVectorError):
        extract(folder / "rl", folder / "sft", folder / "skill", parent=folder / "skill")
    assert contents(folder / "skill") == before


@pytest.mark.parametrize("role", ["target", "skill"])
@pytest.mark.parametrize("spelling", ["same", "dots", "link", "uri"])
def test_a_model_is_never_written_over_what_it_is_made_from(folder, role, spelling):
    (folder / "link").symlink_to(folder / role)
    out = {
        "same": folder / role,
        "dots": folder / "rl" / ".." / role,
        "link": folder / "link",
        "uri": f"file://{folder / role}",
    }[spelling]
    before = contents(folder / role)
    arguments = (folder / "target", folder / "skill")
    assert str(folder / role) in refusal(inject, *arguments, out)
    assert str(folder / role) in refusal(sweep, *arguments, {0.5: folder / "x", 1.0: out})
    assert contents(folder / role) == before
    assert "x" not in names(folder)


@pytest.mark.parametrize("operation", ["extract", "inject"])
def test_a_result_is_never_written_over_a_folder_that_holds_its_inputs(folder, operation):
    # A model itself, as a training run with its checkpoints is.
    write_json(folder / "config.json", {})
    before = names(folder)
    if operation == "extract":
        refusal(extract, folder / "rl", folder / "sft", folder)
    else:
        refusal(inject, folder / "target", folder / "skill", folder)
    assert names(folder) == before


def test_a_sweep_never_writes_two_results_to_one_folder(folder):
    outs = {0.5: folder / "out", 1.0: open_folder(folder / "out")}
    message = refusal(sweep, folder / "target", folder / "skill", outs)
    assert f"must be different folders, but writing {folder / 'out'} would replace" in message
    assert "out" not in names(folder)


@pytest.mark.parametrize("operation", ["extract", "inject"])
def test_a_folder_of_other_things_is_not_replaced(folder, operation):
    (folder / "other").mkdir()
    for number in range(6):
        (folder / "other" / f"{number}.txt").write_text("mine")
    before = contents(folder / "other")
    run, role = {"extract": (extract, "rl"), "inject": (inject, "target")}[operation]
    second = {"rl": "sft", "target": "skill"}[role]
    message = refusal(run, folder / role, folder / second, folder / "other")
    assert (
        f"{folder / 'other'} must be absent, empty, or nothing but a model or a vector" in message
    )
    assert "found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt in it" in message
    assert contents(folder / "other") == before


def test_an_empty_folder_an_older_model_and_an_older_vector_are_replaced(folder):
    (folder / "out").mkdir()
    extract(folder / "rl", folder / "sft", folder / "out")
    assert contents(folder / "out") == contents(folder / "skill")
    inject(folder / "target", folder / "skill", folder / "out")
    assert "skill.json" not in names(folder / "out")
    extract(folder / "rl", folder / "sft", folder / "out")
    assert contents(folder / "out") == contents(folder / "skill")


@pytest.mark.parametrize("below", [".", "below"])
def test_a_file_where_the_result_should_go_is_kept(folder, below):
    (folder / "file").write_text("mine")
    out = folder / "file" / below
    for run, arguments in (
        (extract, (folder / "rl", folder / "sft")),
        (inject, (folder / "target", folder / "skill")),
    ):
        message = refusal(run, *arguments, out, error=StorageError)
        assert f"{folder / 'file'}" in message
    assert (folder / "file").read_text() == "mine"
