"""A checkpoint that is not whole is never resumed from, whatever happened to it."""

import json

import pytest
import torch
from run_records import record

from popmtl.errors import CheckpointDamaged, RequestError
from popmtl.method.front import Hypervolume
from popmtl.runs.checkpoint import (
    checkpoint_name,
    checkpoints,
    commit,
    hypervolume_of,
    keep_last,
    last_of_run,
    read_tensors,
    record_of,
    set_aside,
    subproblem_file,
    whole,
    write_tensors,
)
from popmtl.runs.folder import RunFolder


@pytest.fixture
def folder(storage):
    made = RunFolder.create(storage, "run")
    for step in (100, 200):
        write(made, step)
    return made


def write(folder, step, committed=True):
    name = checkpoint_name(step)
    files = [
        write_tensors(
            folder, f"{name}/{subproblem_file(i)}", {"row": torch.full((5,), float(step + i))}, {"step": step}
        )
        for i in range(2)
    ]
    if committed:
        commit(folder, name, files, record(step))


def found(folder):
    complaints = []
    latest = last_of_run(folder, complaints.append)
    return (latest[0] if latest else None), complaints


def test_what_was_written_comes_back_exactly(folder):
    name = checkpoint_name(200)
    tensors, numbers = read_tensors(folder, name, whole(folder, name)[0][1])
    assert torch.equal(tensors["row"], torch.full((5,), 201.0))
    assert numbers == {"step": 200}
    found, saved, files = last_of_run(folder, pytest.fail)
    assert (found, saved["step"], files) == (name, 200, whole(folder, name)[0])
    assert sorted(folder.files.children(name)) == sorted(FILES), "nothing is left beside the files"


def remove(folder, name):
    folder.files.remove(name)


def empty(folder, name):
    folder.write(name, b"")


def cut(folder, name):
    content = folder.read(name)
    folder.write(name, content[: len(content) // 2])


def flip(folder, name):
    content = bytearray(folder.read(name))
    content[len(content) // 2] ^= 1
    folder.write(name, bytes(content))


FILES = ["manifest.json", "course.json", subproblem_file(0), subproblem_file(1)]


@pytest.mark.parametrize("harm", [remove, empty, cut, flip])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_and_its_file_named(folder, name, harm):
    path = checkpoint_name(200)
    harm(folder, f"{path}/{name}")
    latest, complaints = found(folder)
    assert latest == checkpoint_name(100)
    if (name, harm) == ("manifest.json", remove):
        assert complaints == [], "without its manifest it never was a checkpoint"
        return
    # A flipped bit of the manifest can fall into the name, size or digest of any file.
    assert len(complaints) == 1
    assert path in complaints[0]
    assert name in complaints[0] or name == "manifest.json"


@pytest.mark.parametrize("storage", ["path"], indirect=True)
def test_any_flipped_byte_of_any_file_is_found(folder):
    checkpoint = checkpoint_name(200)
    path = folder.path / checkpoint
    for name in FILES:
        original = (path / name).read_bytes()
        for position in range(len(original)):
            content = bytearray(original)
            content[position] ^= 1
            (path / name).write_bytes(content)
            try:
                whole(folder, checkpoint)
            except CheckpointDamaged:
                continue
            same = json.loads(content) == json.loads(original) if name == "manifest.json" else False
            assert same, f"byte {position} of {name}"
        (path / name).write_bytes(original)
    whole(folder, checkpoint)


@pytest.mark.parametrize("harm", [remove, empty, cut, flip])
def test_who_reads_a_file_finds_its_damage_and_the_checkpoint_can_be_passed_over(folder, harm):
    name = checkpoint_name(200)
    files = whole(folder, name)[0]
    harm(folder, f"{name}/{files[1].name}")
    assert torch.equal(read_tensors(folder, name, files[0])[0]["row"], torch.full((5,), 200.0))
    with pytest.raises(CheckpointDamaged, match=files[1].name):
        read_tensors(folder, name, files[1])
    seen = last_of_run(folder, lambda what: None, contents=False)[0]
    assert seen == (name if harm is flip else checkpoint_name(100)), "sizes alone do not tell"
    set_aside(folder, name, "a reason")
    assert found(folder) == (checkpoint_name(100), [])


def test_what_was_begun_and_not_committed_is_no_checkpoint(folder):
    write(folder, 300, committed=False)
    assert found(folder) == (checkpoint_name(200), [])


def test_without_a_whole_checkpoint_there_is_none(folder):
    for step in (100, 200):
        empty(folder, f"{checkpoint_name(step)}/{subproblem_file(0)}")
    complaints = []
    with pytest.raises(RequestError, match=r"no checkpoint is whole: .*00000200.*; .*00000100"):
        last_of_run(folder, complaints.append)
    assert len(complaints) == 2
    folder.files.remove_folder("checkpoints")
    assert found(folder) == (None, [])


def test_the_last_ones_are_kept_and_what_was_never_committed_goes_with_the_old(folder):
    write(folder, 50, committed=False)
    write(folder, 300)
    write(folder, 400, committed=False)  # being written
    keep_last(folder, 2)
    assert checkpoints(folder) == [checkpoint_name(300), checkpoint_name(200)]
    left = sorted(folder.files.children("checkpoints"))
    assert left == ["step-00000200", "step-00000300", "step-00000400"]


def test_those_who_were_started_again_write_elsewhere_and_what_they_write_is_later(folder):
    names = [checkpoint_name(300, generation) for generation in (0, 1, 2)] + [checkpoint_name(301)]
    assert len(set(names)) == 4
    for name in names:
        commit(folder, name, [], record(300))
    assert checkpoints(folder)[:4] == names[::-1]


def test_damaged_ones_that_are_passed_over_do_not_take_the_place_of_those_that_follow(folder):
    empty(folder, f"{checkpoint_name(200)}/{subproblem_file(0)}")
    set_aside(folder, checkpoint_name(200), "a reason")
    assert found(folder) == (checkpoint_name(100), [])
    commit(folder, checkpoint_name(150, 1), [], record(150))
    keep_last(folder, 1)
    assert checkpoints(folder) == [checkpoint_name(150, 1)]


def test_the_best_one_is_kept_on_request(folder):
    for step, hypervolume in ((300, 2.0), (400, 3.0), (500, 3.0), (600, 1.0), (700, 2.5)):
        commit(folder, checkpoint_name(step), [], record(step, hypervolume=hypervolume))
    folder.write(f"{checkpoint_name(200)}/course.json", b"no course")
    keep_last(folder, 2, best=True)
    assert checkpoints(folder) == [checkpoint_name(step) for step in (700, 600, 500)]
    assert hypervolume_of(record_of(folder, checkpoint_name(500))) == Hypervolume(3.0)
    keep_last(folder, 1)
    assert checkpoints(folder) == [checkpoint_name(700)]


def test_a_version_that_is_not_ours_is_not_read(folder):
    name = checkpoint_name(300)
    file = write_tensors(folder, f"{name}/{subproblem_file(0)}", {"row": torch.zeros(1)}, {})
    commit(folder, name, [file], record(300, n=1, version=99))
    latest, complaints = found(folder)
    assert latest == checkpoint_name(200)
    assert "version 99" in complaints[0]


def test_the_best_evaluation_before_each_that_stays_is_kept(folder):
    for step, best in ((300, 300), (320, 300), (350, 350), (380, 350), (410, 350)):
        commit(folder, checkpoint_name(step), [], record(step, best=best))
        keep_last(folder, 1)
        assert checkpoint_name(best) in checkpoints(folder)
    assert checkpoints(folder) == [checkpoint_name(410), checkpoint_name(350)]
    commit(folder, checkpoint_name(440), [], record(440, best=440))
    keep_last(folder, 2)
    assert checkpoints(folder) == [checkpoint_name(step) for step in (440, 410, 350)]  # 440 may yet be damaged
