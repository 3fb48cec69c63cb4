"""What the weights say is kept, survives a kill, and no file but a model's own is ever used."""

import os
import shutil
import sys
import time
from dataclasses import fields

import pytest
import torch
from conftest import bridge_of, own_bridge_of
from safetensors import safe_open
from safetensors.torch import save_file

import tl_neuron_attr.index as index_module
from tl_neuron_attr import InputError, ProjectionIndex, open_host, project, projection_index
from tl_neuron_attr.host import weights_hash
from tl_neuron_attr.index import Projections, check_index, default_directory
from tl_neuron_attr.readout import ReadOut


def bare_read_out(host, scale=1.0):
    return ReadOut(
        W_U=host.W_U,
        b_U=None,
        gain=host.final_gain,
        bias=None,
        norm_scale=torch.tensor(scale),
        centered=host.norm == "layer_norm",
        eps=host.eps,
        dtype=torch.float32,
    )


def projections_by_definition(host, rows):
    """P of each row in float64: centred if LayerNorm, weighted by the gain, times W_U."""
    rows = rows.double()
    if host.norm == "layer_norm":
        rows = rows - rows.mean(-1, keepdim=True)
    if host.final_gain is not None:
        rows = rows * host.final_gain.double()
    return rows @ host.W_U.double()


def rows_of(host, kind, layer):
    return host.W_out(layer) if kind == "ffn" else host.W_O(layer).flatten(0, 1)


def same(one, other):
    return all(
        torch.equal(
            getattr(getattr(one, kind), field.name), getattr(getattr(other, kind), field.name)
        )
        for kind in ("ffn", "attn")
        for field in fields(Projections)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A GPT-2-like model's index on disk; tests that change files copy it first."""
    directory = tmp_path_factory.mktemp("index")
    model = bridge_of("gpt2")
    return model, directory, projection_index(model, directory)


@pytest.fixture
def on_disk(made, tmp_path):
    model, directory, _ = made
    shutil.copytree(directory, tmp_path / "copy")
    return model, tmp_path / "copy", tmp_path / "copy" / weights_hash(open_host(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_number_is_that_of_the_definition(family, dtype, tmp_path):
    host = open_host(bridge_of(family, dtype=dtype))
    index = projection_index(host, tmp_path, k=5)
    assert index.k == 5 and index.d_vocab == host.d_vocab
    assert index.widest == pytest.approx(float(host.W_U.double().norm(dim=0).max()))
    for kind in ("ffn", "attn"):
        found = getattr(index, kind)
        for layer in range(host.n_layers):
            P = projections_by_definition(host, rows_of(host, kind, layer))
            off = (P - P.mean(1, keepdim=True)).abs()
            expected = {
                "low": P.amin(1),
                "high": P.amax(1),
                "mean": P.mean(1),
                "spread": off.square().mean(1).sqrt(),
                "spread4": off.pow(4).mean(1).pow(0.25),
            }
            allowed = found.rounding[layer].double()
            assert (0 < allowed).all() and (allowed < 2e-5).all()
            for name, wanted in expected.items():
                value = getattr(found, name)[layer].double()
                assert ((value - wanted).abs() <= allowed).all(), name
            assert torch.allclose(
                found.second_moment[layer].double(), P.square().mean(1), rtol=1e-5, atol=1e-9
            )
            for end, largest in (("top", True), ("bottom", False)):
                wanted = P.topk(5, largest=largest)
                assert torch.equal(getattr(found, f"{end}_ids")[layer].long(), wanted.indices)
                logits = getattr(found, f"{end}_logits")[layer].double()
                assert torch.allclose(logits, wanted.values, atol=1e-5)


def test_rows_of_any_size_keep_their_moments(made, tmp_path):
    """Fourth powers of float32 overflow at 1e10 and vanish at 1e-10; rows that are 0 stay 0."""
    model = own_bridge_of("gpt2")
    with torch.no_grad():
        for number, factor in enumerate((1e10, 1e-10, 1e-20, 0.0)):
            model.blocks[0].mlp.W_out[number] *= factor
    found, reference = projection_index(model, tmp_path).ffn, made[2].ffn
    for number, factor in enumerate((1e10, 1e-10, 1e-20, 0.0)):
        for name in ("low", "high", "mean", "spread", "spread4", "rounding"):
            value, wanted = getattr(found, name)[0, number], getattr(reference, name)[0, number]
            assert float(value) == pytest.approx(factor * float(wanted), rel=1e-4), name


def test_blocks_of_rows_and_of_the_vocabulary_change_nothing(made, tmp_path, monkeypatch):
    model, _, whole = made
    monkeypatch.setattr(index_module, "_COLUMNS", 7)
    pieces = projection_index(model, tmp_path, budget=3_000)
    for kind in ("ffn", "attn"):
        for field in fields(Projections):
            one = getattr(getattr(pieces, kind), field.name)
            assert torch.allclose(one, getattr(getattr(whole, kind), field.name), atol=1e-6)


def test_what_is_on_disk_is_read_and_not_computed(made, monkeypatch):
    model, directory, first = made
    monkeypatch.setattr(index_module, "_computed", None)
    monkeypatch.setattr(index_module, "check_writable", None)  # reading needs no permission
    again = projection_index(open_host(model), directory)
    assert isinstance(again, ProjectionIndex) and same(first, again)
    assert again.weights_sha256 == weights_hash(open_host(model))
    assert (again.widest, again.d_vocab) == (first.widest, first.d_vocab)
    fewer = projection_index(model, directory, k=3)
    assert torch.equal(fewer.ffn.top_ids, first.ffn.top_ids[..., :3])


def test_after_a_kill_only_the_missing_layers_are_computed(made, tmp_path, monkeypatch):
    model, _, whole = made
    real_write, real_compute = index_module._write, index_module._computed

    def killed_before_layer_1(path, tensors, sha256, layer):
        if layer == 1:
            raise KeyboardInterrupt
        real_write(path, tensors, sha256, layer)

    monkeypatch.setattr(index_module, "_write", killed_before_layer_1)
    with pytest.raises(KeyboardInterrupt):
        projection_index(model, tmp_path)
    folder = tmp_path / whole.weights_sha256
    assert [path.name for path in folder.iterdir()] == ["layer-000.safetensors"]
    # a process killed while it wrote leaves a temporary file; a young one may be another's
    stale, young = (folder / f".layer-001.safetensors.{name}.tmp" for name in ("old", "new"))
    for path in (stale, young):
        path.write_bytes(b"half a file")
    an_hour_and_more = time.time() - 4000
    os.utime(stale, (an_hour_and_more, an_hour_and_more))
    computed = []

    def counted(host, survey, layer, k, bar):
        computed.append(layer)
        return real_compute(host, survey, layer, k, bar)

    monkeypatch.setattr(index_module, "_write", real_write)
    monkeypatch.setattr(index_module, "_computed", counted)
    assert same(projection_index(model, tmp_path), whole)
    assert computed == [1, 2]
    assert young.exists() and not stale.exists()


def test_a_write_that_fails_leaves_no_half_file(made, tmp_path, monkeypatch):
    model, _, whole = made

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(index_module, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        projection_index(model, tmp_path)
    assert list((tmp_path / whole.weights_sha256).iterdir()) == []


def rewritten(path, change):
    """The file with its tensors and facts changed, and a checksum that is right for them."""
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    facts.pop("content_sha256")
    change(facts, tensors)
    facts["content_sha256"] = index_module._content_hash(facts, tensors)
    save_file(tensors, path, facts)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def drop_a_row(facts, tensors):
    tensors["attn.mean"] = tensors["attn.mean"][1:].clone()


def drop_a_field(facts, tensors):
    del tensors["ffn.spread"]


def other_dtype(facts, tensors):
    tensors["ffn.low"] = tensors["ffn.low"].double()


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "not safetensors": (lambda path: path.write_bytes(b"PK\x03\x04" * 100), "cannot be read"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "a bit of the last tensor": (lambda path: flip(path, -1), "corrupt"),
    "a bit of an early tensor": (lambda path: flip(path, 4000), "corrupt"),
    "no metadata": (lambda path: save_file({"a": torch.zeros(1)}, path), "format"),
    "another version": (
        lambda path: rewritten(path, lambda facts, _: facts.update(format="projection index 9")),
        "format",
    ),
    "another layer's": (
        lambda path: shutil.copy(path.with_name("layer-000.safetensors"), path),
        "of layer 0, not of layer 1",
    ),
    "fewer rows": (lambda path: rewritten(path, drop_a_row), "not those of this model"),
    "a field less": (lambda path: rewritten(path, drop_a_field), "not those of this model"),
    "another dtype": (lambda path: rewritten(path, other_dtype), "not those of this model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_as_it_was_written_is_refused(on_disk, damage, monkeypatch):
    model, directory, folder = on_disk
    path = folder / "layer-001.safetensors"
    act, reason = DAMAGE[damage]
    act(path)
    (folder / "layer-002.safetensors").unlink()
    monkeypatch.setattr(index_module, "_computed", None)  # refused before anything is computed
    with pytest.raises(InputError, match=reason) as raised:
        projection_index(model, directory)
    assert repr(str(path)) in str(raised.value) and "delete that file" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert path.exists() and not (folder / "layer-002.safetensors").exists()


def test_the_header_is_guarded_all_along(on_disk):
    model, directory, folder = on_disk
    path = folder / "layer-001.safetensors"
    sound = path.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    padding = len(sound[:header]) - len(sound[:header].rstrip(b" "))
    for place in range(0, header - padding, 17):
        path.write_bytes(sound)
        flip(path, place)
        with pytest.raises(InputError, match="is not used"):
            projection_index(model, directory)


def test_another_models_file_is_refused_under_any_name(on_disk, tmp_path):
    _, directory, folder = on_disk
    other = bridge_of("gpt2", seed=1)
    theirs = tmp_path / "copy" / weights_hash(open_host(other))
    shutil.copytree(folder, theirs)
    with pytest.raises(InputError, match="from the weights of another model"):
        projection_index(other, directory)
    shutil.rmtree(theirs)
    assert not same(
        projection_index(other, directory), projection_index(bridge_of("gpt2"), directory)
    )


def test_an_index_in_memory_is_told_from_another_models(made):
    check_index(open_host(made[0]), made[2])
    with pytest.raises(InputError, match="of other weights"):
        check_index(open_host(bridge_of("gpt2", seed=1)), made[2])


def test_more_tokens_than_the_file_has_are_asked_of_another_directory(on_disk):
    model, directory, _ = on_disk
    with pytest.raises(InputError, match="has 10 tokens of each end, not 11"):
        projection_index(model, directory, k=11)
    with pytest.raises(InputError, match="at least 1"):
        projection_index(model, directory, k=0)


def test_no_more_tokens_are_kept_than_there_are(tmp_path):
    model = bridge_of("gpt2")
    assert projection_index(model, tmp_path, k=1000).k == 61
    assert projection_index(model, tmp_path, k=1000).k == 61


@pytest.mark.parametrize("kind", ["ffn", "attn"])
def test_tokens_are_those_a_projection_gives(tiny_model, tmp_path, kind):
    host = open_host(tiny_model)
    index = projection_index(tiny_model, tmp_path)
    generator = torch.Generator().manual_seed(0)
    layer = torch.randint(0, host.n_layers, (20,), generator=generator)
    row = torch.randint(0, host.n_heads * host.d_head, (20,), generator=generator)
    sign = torch.randn(20, generator=generator).sign()
    subvalues = torch.stack(
        [rows_of(host, kind, int(at))[r] for at, r in zip(layer, row, strict=True)]
    )
    out = bare_read_out(host, 0.7)
    for signs, k in ((None, 10), (sign, 10), (sign, 4)):
        vectors = subvalues if signs is None else signs[:, None] * subvalues
        wanted = project(out, vectors, k)
        found = index.tokens(kind, layer, row, norm_scale=0.7, sign=signs, k=k)
        assert torch.equal(found.top_ids, wanted.top_ids)
        assert torch.equal(found.bottom_ids, wanted.bottom_ids)
        assert torch.allclose(found.top_logits, wanted.top_logits, atol=1e-5)
        assert torch.allclose(found.bottom_logits, wanted.bottom_logits, atol=1e-5)
        assert torch.allclose(found.mean, wanted.mean, atol=1e-5)
        assert torch.allclose(found.readability, wanted.readability, atol=1e-4)
    with pytest.raises(InputError, match="holds 10 tokens of each end, 11 were asked for"):
        index.tokens(kind, layer, row, k=11)


def test_a_directory_that_cannot_be_written_is_found_before_computing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(index_module, "_computed", None)
    with pytest.raises(InputError, match="is not a directory"):
        projection_index(bridge_of("gpt2"), tmp_path / "file")


def test_truncated_products_are_not_kept(made, tmp_path):
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(InputError, match="'medium'"):
            projection_index(made[0], tmp_path)
        assert same(projection_index(made[0], made[1]), made[2])  # reading one is no matter
    finally:
        torch.set_float32_matmul_precision("highest")
    assert list(tmp_path.iterdir()) == []


def test_autocast_of_the_caller_changes_nothing(made, tmp_path):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(projection_index(made[0], tmp_path), made[2])


@pytest.mark.skipif(sys.platform != "linux", reason="the environment variable is Linux's")
def test_indices_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "tl_neuron_attr" / "index"
    index = projection_index(bridge_of("gpt2"))
    assert (default_directory() / index.weights_sha256 / "layer-002.safetensors").is_file()


def test_progress_is_silent_unless_it_takes_long(made, tmp_path, capsys):
    projection_index(made[0], tmp_path, progress=True)
    assert capsys.readouterr() == ("", "")
