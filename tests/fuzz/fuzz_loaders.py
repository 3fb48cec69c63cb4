"""Every loader, given files that were damaged in all ways a fuzzer finds.

    python tests/fuzz/fuzz_loaders.py --minutes 10          # coverage-guided, where atheris is
    python tests/fuzz/fuzz_loaders.py --minutes 10 --plain  # random damage alone

What must hold: only the package's own errors escape, nothing outside the directory is written or
read, and memory does not grow beyond a limit. The bytes that break it are kept in ``--out``.
Atheris (``pip install atheris``) is no requirement of the project.

An input is: which loader and file, and either the bytes that file then has, or what the damage done
to the sound one is drawn by. (Of Parquet files few made-up bytes are read further than the end.)
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

MEMORY = 512 * 2**20
"""Bytes that one damaged file may make the process grow by."""


@dataclass(frozen=True)
class Loader:
    """Something that reads files, and sound files of it."""

    name: str
    read: Callable[[Path], object]
    files: tuple[str, ...]
    """Names in its directory; reading is of the directory, or of the one file there is."""
    sealed: Callable[[Path], None] = lambda place: None
    """Makes hashes true again, so that damage is met behind them too."""


class Violation(AssertionError):
    """What a loader must not do."""


def loaders() -> tuple[Loader, ...]:
    from tl_neuron_attr import load_capture, load_evaluation, load_model, load_prompts, load_run
    from tl_neuron_attr.cli.options import prompts_in
    from tl_neuron_attr.index import projection_index
    from tl_neuron_attr.report.saved import read_saved
    from tl_neuron_attr.runs.asked import source_of

    def run(place):
        found = load_run(place)
        for table in found.tables:
            found.table(table)
        return found.summary()

    model = load_model()

    def prompts(name, read):
        return Loader(name, lambda place: read(str(place / name)), (name,))

    return (
        prompts("prompts.jsonl", lambda path: list(source_of(path)())),
        prompts("prompts.csv", lambda path: list(source_of(path)())),
        prompts("prompts.parquet", lambda path: list(source_of(path)())),
        prompts("lre.json", load_prompts),
        prompts("set.jsonl", load_prompts),
        prompts("texts.jsonl", lambda path: prompts_in(Path(path))),
        Loader("capture", load_capture, ("capture.json", "capture.safetensors"), _seal_capture),
        Loader("result", read_saved, ("run.json", "neurons.parquet", "layers.parquet")),
        Loader("run", run, ()),
        Loader("evaluation", load_evaluation, ()),
        Loader("index", lambda place: projection_index(model, place), ()),
    )


def _seal_capture(place: Path) -> None:
    try:
        facts = json.loads((place / "capture.json").read_bytes())
        data = (place / "capture.safetensors").read_bytes()
        facts["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    except (OSError, ValueError, TypeError, RecursionError):
        return
    (place / "capture.json").write_text(json.dumps(facts))


def write_sound(place: Path) -> dict[str, Path]:
    """Sound files of every loader, by its name."""
    import pandas as pd

    from tl_neuron_attr import (
        attribute,
        capture,
        evaluate,
        load_model,
        load_prompts,
        open_host,
        run_prompts,
        save_capture,
        tokenize,
    )
    from tl_neuron_attr.index import projection_index
    from tl_neuron_attr.prompts import Prompt

    model, text = load_model(), "The capital of France is"
    rows = [
        {"text": text, "target": " Paris", "knowledge_type": "capital", "prompt_id": "1"},
        {"text": "The capital of Italy is", "target": " Rome", "knowledge_type": "capital"},
    ]
    for name in ("prompts.jsonl", "set.jsonl", "texts.jsonl"):
        kept = [
            {key: row[key] for key in row if name != "texts.jsonl" or key != "knowledge_type"}
            for row in rows
        ]
        if name == "set.jsonl":
            kept = [{"text": row["text"], "answer": row["target"]} for row in rows]
        (place / name).mkdir()
        (place / name / name).write_text("\n".join(map(json.dumps, kept)))
    for name in ("prompts.csv", "prompts.parquet"):
        (place / name).mkdir()
        frame = pd.DataFrame(rows)
        if name.endswith("csv"):
            frame.to_csv(place / name / name, index=False)
        else:
            frame.to_parquet(place / name / name)
    relation = {
        "name": "capital",
        "prompt_templates": ["The capital of {} is"],
        "samples": [{"subject": "France", "object": "Paris"}],
    }
    (place / "lre.json").mkdir()
    (place / "lre.json" / "lre.json").write_text(json.dumps(relation))
    host = open_host(model)
    save_capture(capture(host, tokenize(host, Prompt(text=text))), place / "capture")
    attribute(model, text, top=3).save(place / "result")
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        run_prompts("tiny-facts", [row["text"] for row in rows], place / "run", top=3)
    known = load_prompts("capital")[:2]
    evaluate(model, known, methods=["a"], top=[3], filtered=False).save(place / "evaluation")
    projection_index(model, place / "index", progress=False)
    return {path.name: path for path in place.iterdir()}


# --- one damaged file -------------------------------------------------------------------------

_watched: dict[str, Path] = {}


def _watch(event: str, arguments: tuple) -> None:
    """Every file that is opened while a loader reads must be in its directory."""
    if event != "open" or "place" not in _watched or not isinstance(arguments[0], (str, bytes)):
        return
    path = Path(os.fsdecode(arguments[0])).resolve()
    known = (
        _watched["place"].resolve(),
        *map(Path, (sys.prefix, sys.base_prefix, "/proc", "/dev")),
    )
    package = Path(__file__).resolve().parents[2]
    if not any(path.is_relative_to(each) for each in (*known, package)):
        _watched["outside"] = path


def try_one(loader: Loader, sound: Path, file: str, content: bytes, seal: bool = True) -> None:
    """Read the loader's directory with one file of other bytes.

    Raises:
        Violation: If another error than the package's own escapes, and so on.
    """
    from tl_neuron_attr import NeuronAttrError

    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        place = Path(scratch) / "given"
        shutil.copytree(sound, place)
        (place / file).write_bytes(content)
        if seal:
            loader.sealed(place)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _watched.clear()
        _watched["place"] = place
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loader.read(place)
        except NeuronAttrError as error:
            if "\n" in str(error).strip() and len(str(error)) > 2000:
                raise Violation(f"{loader.name}: the error is no sentence: {error}") from error
        except Exception as error:
            raise Violation(f"{loader.name}, {file}: {type(error).__name__}: {error}") from error
        finally:
            outside = _watched.pop("outside", None)
            _watched.clear()
        if outside is not None:
            raise Violation(f"{loader.name}, {file}: opened {str(outside)!r}")
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MEMORY:
            raise Violation(f"{loader.name}, {file}: memory grew by {grown / 2**20:.0f} MiB")
        if [path.name for path in Path(scratch).iterdir()] != ["given"]:
            raise Violation(f"{loader.name}, {file}: wrote beside its directory")


def targets(sound: dict[str, Path]) -> list[tuple[Loader, Path, str]]:
    """Every loader with each of its files."""
    return [
        (loader, sound[loader.name], file)
        for loader in loaders()
        for file in loader.files
        or sorted(
            str(path.relative_to(sound[loader.name]))
            for path in sound[loader.name].rglob("*")
            if path.is_file()
        )
    ]


# --- random damage ----------------------------------------------------------------------------

_WORDS = (
    b"null", b"-1", b"1e999", b"NaN", b"{}", b"[]", b'""', b"\xff\xfe", b"\x00", b"9" * 30,
    b"../../evil", b'"\\ud800"', b"true", b"\n", b",", b"[" * 2000,
)  # fmt: skip


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The bytes with a few changes of the kinds that files suffer."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(found) + 1)
        kind = chance.randrange(6)
        if kind == 0:
            found = found[:place]
        elif kind == 1 and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif kind == 2:
            found[place:place] = chance.choice(_WORDS)
        elif kind == 3:
            found[place : place + chance.randrange(20)] = b""
        elif kind == 4:
            # a whole value of JSON in place of another
            stop = place + chance.randrange(1, 12)
            found[place:stop] = chance.choice(_WORDS)
        else:
            found[place:place] = found[place : place + chance.randrange(50)]
    return bytes(found)


def fuzz_plainly(seconds: float, seed: int = 0, most: int | None = None) -> dict[str, object]:
    """Random damage for so long, or so many times; what was found, by what it says."""
    sys.addaudithook(_watch)
    chance = random.Random(seed)
    found: dict[str, object] = {}
    tried = 0
    with tempfile.TemporaryDirectory(prefix="sound-") as scratch:
        every = targets(write_sound(Path(scratch)))
        started = time.perf_counter()
        while time.perf_counter() - started < seconds and tried != most:
            loader, sound, file = every[tried % len(every)]
            content = damaged((sound / file).read_bytes(), chance)
            tried += 1
            try:
                try_one(loader, sound, file, content, seal=chance.random() < 0.8)
            except Violation as violation:
                found.setdefault(str(violation)[:160], (loader.name, file, content))
    return {"tried": tried, "targets": len(every), "found": found}


# --- guided by coverage -----------------------------------------------------------------------


def fuzz_guided(seconds: float, out: Path) -> None:
    """libFuzzer, by what code of the package each input reaches; ends at the first violation."""
    import atheris

    with atheris.instrument_imports(include=["tl_neuron_attr"]):
        import tl_neuron_attr.cli.options
        import tl_neuron_attr.evaluate
        import tl_neuron_attr.report.saved
        import tl_neuron_attr.runs

    assert tl_neuron_attr.runs
    sys.addaudithook(_watch)
    scratch = Path(tempfile.mkdtemp(prefix="sound-"))
    every = targets(write_sound(scratch))
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, (_, sound, file) in enumerate(every):
        (corpus / f"{number}").write_bytes(bytes([number, 0]) + (sound / file).read_bytes())
        (corpus / f"{number}-drawn").write_bytes(bytes([number, 1, number]))

    def one(data: bytes) -> None:
        if len(data) < 2:
            return
        loader, sound, file = every[data[0] % len(every)]
        content = data[2:]
        if data[1] % 2:
            content = damaged((sound / file).read_bytes(), random.Random(content))
        try_one(loader, sound, file, content)

    options = [f"-max_total_time={int(seconds)}", "-rss_limit_mb=4096", "-max_len=200000"]
    options += [f"-artifact_prefix={out}/", "-timeout=20", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--plain", action="store_true", help="random damage, without coverage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzzed"))
    given = parser.parse_args()
    if not given.plain:
        fuzz_guided(60 * given.minutes, given.out)
        return
    report = fuzz_plainly(60 * given.minutes, given.seed)
    print(f"{report['tried']} damaged files of {report['targets']} kinds")
    for number, (says, (name, file, content)) in enumerate(report["found"].items()):
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{number}-{name}-{Path(file).name}").write_bytes(content)
        print(f"{number}: {says}")
    sys.exit(1 if report["found"] else 0)


if __name__ == "__main__":
    main()
