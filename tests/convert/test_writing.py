"""Files that are written: whole or not at all, and restored bit for bit."""

import errno
import json
import pathlib
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from flax_mha import convert
from flax_mha.convert import (
    load_params,
    read_state_dict,
    save_params,
    save_safetensors,
)
from tests.convert.test_files import ONES, assert_raises, assert_same


@pytest.fixture
def disk_full():
    """No file may grow beyond 4 KiB; the system then fails to write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


ATTENTION = {
    "attn.in_proj_weight": np.ones((12, 4)),
    "attn.out_proj.weight": np.ones((4, 4)),
    "attn.in_proj_bias": np.ones(12),
    "attn.out_proj.bias": np.ones(4),
}
CONVERSION = convert.plan_tree(
    {**ATTENTION, "position_ids": ONES["a"]}, 2, ignore=["position_ids"]
)
CONVERTED = CONVERSION.params(ATTENTION)
KERNEL = np.random.default_rng(0).normal(size=(100, 100))  # which nothing compresses
TREE = {"layers_0": {"kernel": KERNEL}, "bias": ONES["b"]}
WRITERS = {
    "state_dict": (
        "a.safetensors",
        save_safetensors,
        {"a": TREE["layers_0"]["kernel"]},
    ),
    "folder": ("folder", save_safetensors, {"a": TREE["layers_0"]["kernel"]}),
    "params": ("a.safetensors", save_params, TREE),
    "orbax": ("folder", save_params, TREE),
}
by_writer = pytest.mark.parametrize(
    "name, save, content", WRITERS.values(), ids=WRITERS
)


def files_below(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.usefixtures("disk_full")
def test_full_disk_leaves_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    for save, content in ((save_safetensors, {"a": KERNEL}), (save_params, TREE)):
        with pytest.raises(OSError, match=r"File too large: .*/a\.safetensors'"):
            save(path, content)
    assert not list(tmp_path.iterdir())


def small(content):
    return jax.tree.map(lambda array: array[:1], content)


@by_writer
def test_what_exists_is_replaced_only_when_asked(tmp_path, name, save, content):
    save(tmp_path / name, small(content))
    before = files_below(tmp_path)
    assert_raises(
        FileExistsError, "overwrite=True", lambda: save(tmp_path / name, content)
    )
    assert files_below(tmp_path) == before
    save(tmp_path / name, content, overwrite=True)
    assert files_below(tmp_path) != before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_lazy_mapping_that_fails_leaves_nothing(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", ONES)
    state_dict = read_state_dict(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed"):
        save_safetensors(tmp_path / "b.safetensors", state_dict)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path):
    save_safetensors(tmp_path / "model.safetensors", ONES)
    (tmp_path / "thesis.tex").write_text("years of work")
    before = files_below(tmp_path)
    for path in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="is no Orbax checkpoint"):
            save_params(path, TREE, overwrite=True)
        with pytest.raises(FileExistsError, match=r"a model's tensors only: thesis"):
            save_safetensors(path, ONES, overwrite=True)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("size", ["5GB", 0, 1e9])
def test_a_size_of_files_is_a_number_of_bytes(tmp_path, size):
    with pytest.raises(ValueError, match=f"must be a number of bytes, got {size!r}"):
        save_safetensors(tmp_path / "m", ONES, max_file_size=size)
    assert not list(tmp_path.iterdir())


def test_a_folder_has_files_of_a_size_and_their_index(tmp_path):
    large, small = np.ones((10, 10), "float32"), np.ones(20, "float16")
    tensors = {"a": small, "b": small, "c": small, "large": large, "d": small}
    save_safetensors(tmp_path / "m", tensors, {"by": "us"}, max_file_size=100)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    names = [["a", "b"], ["c"], ["large"], ["d"]]
    assert index == {
        "metadata": {"total_size": 560},
        "weight_map": {
            name: file for file, part in zip(files, names, strict=True) for name in part
        },
    }
    for file, part in zip(files, names, strict=True):
        with safe_open(tmp_path / "m" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt", "by": "us"}
            assert sorted(opened.keys()) == part
    assert_same(read_state_dict(tmp_path / "m"), tensors)
    save_safetensors(tmp_path / "m", {"a": small}, overwrite=True)
    assert list(files_below(tmp_path)) == ["m/model.safetensors"]
    assert_same(read_state_dict(tmp_path / "m"), {"a": small})


NOT_WRITTEN = {
    "ending": ("a.pt", ONES, None, ValueError, "path must end in .safetensors"),
    "dtype": (
        "a.safetensors",
        {"a": np.ones(1, "complex128")},
        None,
        ValueError,
        "'a' of complex128 cannot be written to safetensors",
    ),
    "big-endian": (
        "a.safetensors",
        {"a": np.ones(1, ">f4")},
        None,
        ValueError,
        "'a' of >f4 cannot be written",
    ),
    "no array": (
        "a.safetensors",
        {"a": [1.0]},
        None,
        TypeError,
        "a must be a torch tensor, NumPy array or JAX array, got <class 'list'>.",
    ),
    "number as name": (
        "a.safetensors",
        {3: ONES["a"]},
        None,
        TypeError,
        "names in state_dict must be strings",
    ),
    "number as text": ("a.safetensors", ONES, {"a": 3}, TypeError, "names, and the te"),
    "header's own name": (
        "a.safetensors",
        {"__metadata__": ONES["a"]},
        None,
        ValueError,
        "'__metadata__' of float32 cannot be written",
    ),
    "no such folder": (
        "none/a.safetensors",
        ONES,
        None,
        FileNotFoundError,
        "must be in a folder that exists",
    ),
}


@pytest.mark.parametrize(
    "name, state_dict, metadata, error, text", NOT_WRITTEN.values(), ids=NOT_WRITTEN
)
def test_what_cannot_be_written_is_refused(
    tmp_path, name, state_dict, metadata, error, text
):
    path = tmp_path / name
    assert_raises(error, text, lambda: save_safetensors(path, state_dict, metadata))
    assert not list(tmp_path.iterdir())


# Parameters


@pytest.mark.parametrize("name", ["params.safetensors", "checkpoint"])
def test_params_round_trip_keeps_every_bit(tmp_path, name):
    params = {
        "layers_0": {"attn": {"in_proj_weight": np.ones((3, 2, 1, 2))}},
        "scale": np.full(3, 2, jnp.bfloat16),
        "small": np.ones(4, jnp.float8_e4m3fn),
        "step": np.array(3),
        "on_device": jnp.ones(2),
    }
    save_params(tmp_path / name, params)
    loaded, conversion = load_params(tmp_path / name)
    assert conversion is None
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for got, want in zip(jax.tree.leaves(loaded), jax.tree.leaves(params), strict=True):
        assert isinstance(got, np.ndarray)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("name", ["params.safetensors", "checkpoint"])
def test_conversion_is_kept_beside_the_params(tmp_path, name):
    save_params(tmp_path / name, CONVERTED, CONVERSION)
    assert load_params(tmp_path / name)[1] == CONVERSION


@pytest.mark.parametrize("name", ["params.safetensors", "checkpoint"])
def test_what_save_params_wrote_is_no_state_dict(tmp_path, name):
    save_params(tmp_path / name, CONVERTED)
    text = f"{name}' must be PyTorch's, but is "
    assert_raises(ValueError, text, lambda: read_state_dict(tmp_path / name))


def test_conversion_that_does_not_fit_is_refused(tmp_path):
    save_params(tmp_path / "checkpoint", CONVERTED, CONVERSION)
    record = tmp_path / "checkpoint" / "flax_mha.json"
    text = record.read_text()
    for here, there, message in (
        ('"num_heads": 2', '"num_heads": 4', "num_heads of 'attn' must be 2, as that"),
        ('"attn/out_proj/bias"', '"bias"', "missing: bias (4,)"),
        ("{", "", "text must be what Conversion.to_json returned"),
    ):
        record.write_text(text.replace(here, there))
        with pytest.raises(ValueError, match=r"flax_mha\.json' has no conv") as raised:
            load_params(tmp_path / "checkpoint")
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="params must be as converted"):
        save_params(tmp_path / "other", TREE, CONVERSION)
    with pytest.raises(ValueError, match="pass variables instead of variables"):
        save_params(tmp_path / "other", {"params": CONVERTED}, CONVERSION)
    assert not (tmp_path / "other").exists()


def test_error_names_what_the_caller_named(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"denied: .*/a\.safetensors'$"):
        save_safetensors(tmp_path / "a.safetensors", ONES)


RESTORE = """
import sys, warnings
warnings.simplefilter("ignore")  # Orbax's, on shardings
import numpy as np, orbax.checkpoint as ocp
params = ocp.StandardCheckpointer().restore(sys.argv[1])
assert params["layers_0"]["kernel"].shape == (100, 100), params
assert (np.asarray(params["bias"]) == 1).all()
assert "flax_mha" not in sys.modules
"""


def test_orbax_alone_restores_the_params_in_a_new_process(tmp_path):
    state_dict = {"layers.0.kernel": KERNEL, "bias": ONES["b"]}
    conversion = convert.plan_tree(state_dict, kinds={".*": "weight"})
    save_params(tmp_path / "checkpoint", TREE, conversion)
    subprocess.run([sys.executable, "-c", RESTORE, tmp_path / "checkpoint"], check=True)


def test_params_that_cannot_be_saved_or_loaded(tmp_path):
    save_safetensors(tmp_path / "torch.safetensors", ONES)
    path = tmp_path / "new"
    for error, text, call in (
        (TypeError, "params must be nested", lambda: save_params(path, [1])),
        (TypeError, "must be a torch", lambda: save_params(path, {"a": [1]})),
        (ValueError, "without a slash", lambda: save_params(path, {"a/b": ONES["a"]})),
        (
            ValueError,
            "params must have elements, which Orbax wants, but b/a has none: leave",
            lambda: save_params(path, {"b": {"a": np.ones((0, 3))}}),
        ),
        (
            ValueError,
            "path must end in .safetensors for a file, or be a folder's, got",
            lambda: save_params(path.with_suffix(".msgpack"), TREE),
        ),
        (
            ValueError,
            "must be written by `save_params`",
            lambda: load_params(tmp_path / "torch.safetensors"),
        ),
        (ValueError, "must be an Orbax checkpoint", lambda: load_params(tmp_path)),
        (FileNotFoundError, "new", lambda: load_params(path)),
    ):
        assert_raises(error, text, call)
    assert [path.name for path in tmp_path.iterdir()] == ["torch.safetensors"]


# In a process of its own: TensorStore may report what failed once more, much later.
ORBAX_FAILURES = """
import errno, os, pathlib, resource, sys
import numpy as np
from flax_mha.convert import load_params, save_params

folder = pathlib.Path(sys.argv[1])
tree = {"a": np.random.default_rng(0).normal(size=(100, 100))}
for broken in ("manifest.ocdbt", "_METADATA", "d/*", "o*/d/*"):
    save_params(folder / "checkpoint", tree, overwrite=True)
    for path in (folder / "checkpoint").glob(broken):
        os.truncate(path, path.stat().st_size // 2)
    try:
        load_params(folder / "checkpoint")
    except ValueError:
        continue
    raise AssertionError(f"{broken} was not missed")

_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
try:
    save_params(folder / "new", tree)
except OSError as error:
    assert error.errno == errno.EFBIG, error
    assert os.listdir(folder) == ["checkpoint"], os.listdir(folder)
else:
    raise AssertionError("nothing failed")
"""


def test_orbax_checkpoint_that_is_broken_or_does_not_fit(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "_CHECKPOINT_METADATA").touch()  # to be replaced
    subprocess.run([sys.executable, "-c", ORBAX_FAILURES, tmp_path], check=True)
