"""Loaders given damaged files: the package's own errors, and nothing else, escape."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "fuzz" / "fuzz_loaders.py"
_spec = importlib.util.spec_from_file_location("fuzz_loaders", SCRIPT)
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        return fuzz.targets(fuzz.write_sound(tmp_path_factory.mktemp("sound")))


def tried(targets, content_of):
    """What went wrong, by what it says."""
    wrong = []
    for loader, sound, file in targets:
        try:
            fuzz.try_one(loader, sound, file, content_of((sound / file).read_bytes()))
        except fuzz.Violation as violation:
            wrong.append(str(violation))
    return wrong


def test_sound_files_are_read(targets):
    for loader, sound in {loader.name: (loader, sound) for loader, sound, _ in targets}.values():
        loader.read(sound)


def test_files_nested_too_deep_cut_short_or_of_no_text_are_refused(targets):
    assert tried(targets, lambda content: b"[" * 100_000) == []
    assert tried(targets, lambda content: content[: len(content) // 2]) == []
    assert tried(targets, lambda content: b"\xff\xfe\x00" + content) == []
    assert tried(targets, lambda content: b"null") == []


def test_files_damaged_at_random_are_refused_or_read(targets):
    chance = fuzz.random.Random(20261121)
    assert tried(targets * 2, lambda content: fuzz.damaged(content, chance)) == []


def test_a_loader_that_lets_another_error_out_is_found(targets):
    def careless(place):
        raise KeyError("absent")

    loader, sound, file = targets[0]
    broken = fuzz.Loader("careless", careless, (file,))
    with pytest.raises(fuzz.Violation, match="careless, .*: KeyError: 'absent'"):
        fuzz.try_one(broken, sound, file, b"")
