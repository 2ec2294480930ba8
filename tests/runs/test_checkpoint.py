"""A checkpoint that is not whole is never resumed from, whatever happened to it."""

import json
import shutil

import pytest
import torch

from popmtl.runs.checkpoint import (
    checkpoint_path,
    checkpoints,
    commit,
    damage,
    keep_last,
    last_whole,
    read_tensors,
    set_aside_after,
    subproblem_file,
    write_tensors,
)
from popmtl.runs.folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    made = RunFolder.create(tmp_path, "run")
    for step in (100, 200):
        write(made, step)
    return made


def write(folder, step, committed=True):
    path = checkpoint_path(folder, step)
    files = [
        write_tensors(path / subproblem_file(i), {"row": torch.full((5,), float(step + i))}, {"step": step})
        for i in range(2)
    ]
    if committed:
        commit(path, files, {"step": step})


def found(folder):
    complaints = []
    whole = last_whole(folder, complaints.append)
    return (whole[0].name if whole else None), complaints


def test_what_was_written_comes_back_exactly(folder):
    path = checkpoint_path(folder, 200)
    tensors, numbers = read_tensors(path / subproblem_file(1))
    assert torch.equal(tensors["row"], torch.full((5,), 201.0))
    assert numbers == {"step": 200}
    whole, course = last_whole(folder, pytest.fail)
    assert (whole, course["step"]) == (path, 200)
    assert not list(path.glob(".*")), "nothing is left beside the files"


def remove(file):
    file.unlink()


def empty(file):
    file.write_bytes(b"")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = ["manifest.json", "course.json", subproblem_file(0), subproblem_file(1)]


@pytest.mark.parametrize("harm", [remove, empty, cut, flip])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_its_file_named(folder, name, harm):
    path = checkpoint_path(folder, 200)
    harm(path / name)
    latest, complaints = found(folder)
    assert latest == "step-00000100"
    if (name, harm) == ("manifest.json", remove):
        assert complaints == [], "without its manifest it never was a checkpoint"
        return
    # A flipped bit of the manifest can fall into the name, size or digest of any file.
    assert len(complaints) == 1
    assert str(path) in complaints[0]
    assert name in complaints[0] or name == "manifest.json"


def test_any_flipped_byte_of_any_file_is_found(folder):
    path = checkpoint_path(folder, 200)
    for name in FILES:
        original = (path / name).read_bytes()
        for position in range(len(original)):
            content = bytearray(original)
            content[position] ^= 1
            (path / name).write_bytes(content)
            if damage(path) is None:
                same = json.loads(content) == json.loads(original) if name == "manifest.json" else False
                assert same, f"byte {position} of {name}"
        (path / name).write_bytes(original)
    assert damage(path) is None


def test_what_was_begun_and_not_committed_is_no_checkpoint(folder):
    write(folder, 300, committed=False)
    assert found(folder) == ("step-00000200", [])


def test_without_a_whole_checkpoint_there_is_none(folder):
    for step in (100, 200):
        empty(checkpoint_path(folder, step) / subproblem_file(0))
    latest, complaints = found(folder)
    assert latest is None
    assert len(complaints) == 2
    shutil.rmtree(folder.path / "checkpoints")
    assert found(folder) == (None, [])


def test_the_last_ones_are_kept_and_what_was_never_committed_goes_with_the_old(folder):
    write(folder, 50, committed=False)
    write(folder, 300)
    write(folder, 400, committed=False)  # being written
    keep_last(folder, 2)
    assert [path.name for path in checkpoints(folder)] == ["step-00000300", "step-00000200"]
    left = sorted(path.name for path in (folder.path / "checkpoints").iterdir())
    assert left == ["step-00000200", "step-00000300", "step-00000400"]


def test_those_who_were_started_again_write_elsewhere_and_what_they_write_is_later(folder):
    paths = [checkpoint_path(folder, 300, generation) for generation in (0, 1, 2)] + [checkpoint_path(folder, 301)]
    assert len(set(paths)) == 4
    for path in paths:
        commit(path, [], {"step": 300})
    assert checkpoints(folder)[:4] == paths[::-1]


def test_damaged_ones_that_are_passed_over_do_not_take_the_place_of_those_that_follow(folder):
    empty(checkpoint_path(folder, 200) / subproblem_file(0))
    whole, _ = last_whole(folder, lambda what: None)
    set_aside_after(folder, whole)
    commit(checkpoint_path(folder, 150, 1), [], {"step": 150})
    keep_last(folder, 1)
    assert [path.name for path in checkpoints(folder)] == ["step-00000150-0001"]


def test_a_version_that_is_not_ours_is_not_read(folder):
    path = checkpoint_path(folder, 300)
    file = write_tensors(path / subproblem_file(0), {"row": torch.zeros(1)}, {})
    commit(path, [file], {"step": 300, "version": 99})
    latest, complaints = found(folder)
    assert latest == "step-00000200"
    assert "version 99" in complaints[0]
