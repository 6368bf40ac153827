"""The command line, on files that need no PyTorch."""

import io
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from flax_mha import convert
from flax_mha._cli import _commands, main
from tests.convert.test_writing import files_below

WIDTH, HEADS = 8, 2


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def attention(prefix, seed=0):
    return {
        f"{prefix}.in_proj_weight": normal(3 * WIDTH, WIDTH, seed=seed),
        f"{prefix}.in_proj_bias": normal(3 * WIDTH, seed=seed + 1),
        f"{prefix}.out_proj.weight": normal(WIDTH, WIDTH, seed=seed + 2),
        f"{prefix}.out_proj.bias": normal(WIDTH, seed=seed + 3),
    }


def model():
    return {
        **attention("model.layers.0.self_attn"),
        **attention("model.layers.1.self_attn", seed=10),
        "model.embed.weight": normal(5, WIDTH),
        "model.norm.weight": normal(WIDTH),
        "model.norm.bias": normal(WIDTH),
        "head.steps": np.arange(3.0),
    }


OPTIONS = ["--num-heads", "2", "--kind", r".*\.embed=embedding"]
OVERWRITE = "--overwrite"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a checkpoint `model.safetensors`."""
    monkeypatch.chdir(tmp_path)
    convert.save_safetensors("model.safetensors", model())
    return tmp_path


def run(capsys, *argv, code=0):
    """Returns what is printed, if nothing is an error."""
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_inspect_lists_layers_look_alikes_and_sizes(folder, capsys):
    tensors = model() | {
        "whisper.q_proj.weight": normal(8, 8),
        "cross[0].attn.q_proj_weight": normal(8, 8),
        "cross[0].attn.k_proj_weight": normal(8, 3),
        "cross[0].attn.v_proj_weight": normal(8, 5),
        "cross[0].attn.out_proj.weight": normal(8, 8),
    }
    convert.save_safetensors("more.safetensors", tensors)
    out = run(capsys, "inspect", "more.safetensors")
    layer = r"model\.layers\.\*\.self_attn +torch +\? +8 +float32 +1\.2 kB +2 "
    assert re.search(layer, out)
    cross = r"cross\[0\]\.attn +torch +\? +8, kdim 3, vdim 5 +bias=False +float32"
    assert re.search(cross, out)
    assert re.search(r"whisper +missing: ", out)
    assert "17 tensors" in out


def test_inspect_shows_heads_the_tree_in_flax_and_what_convert_asks(folder, capsys):
    out = run(capsys, "inspect", "model.safetensors")
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    weight = "model/layers_*/self_attn/in_proj_weight"
    assert "(3, heads, 8/heads, 8)   float32   2" in rows[weight]
    assert "(5, 8)" in rows["model/embed/embedding?"]  # which convert asks
    asked = out[out.index("convert asks:") :].splitlines()
    first = "  model.layers.0.self_attn (embed_dim 8), model.layers.1.self_attn (embed_"
    assert asked[1].replace("'", "").startswith(first)
    assert asked[1].endswith(r" --num-heads 'model\.layers\.\d+\.self_attn=N'")
    assert asked[2] == (
        "  model.embed.weight may be a Linear's or an Embedding's: "
        "--kind 'model\\.embed=embedding' or \"kernel\""
    )
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    out = run(capsys, "inspect", "model.safetensors")
    assert re.search(r"model\.layers\.\*\.self_attn +torch +4 +8 ", out)
    assert "(3, 4, 2, 8)" in out and "number of heads" not in out


def test_inspect_of_thousands_of_layers_is_short(folder, capsys):
    tensors = {}
    for number in range(1000):
        tensors |= attention(f"layers.{number}.attn")
    convert.save_safetensors("deep.safetensors", tensors)
    out = run(capsys, "inspect", "deep.safetensors")
    assert re.search(r"layers\.\*\.attn +torch .* 1000 ", out)
    assert out.count("\n") < 20


def test_names_are_shown_without_what_a_terminal_obeys(folder, capsys):
    name = "\x1b[31mred\x07\u202e\ud800\n"
    convert.save_safetensors("a.safetensors", attention(name))
    texts = [run(capsys, "inspect", "a.safetensors")]
    texts.append(run(capsys, "diff", "a.safetensors", "model.safetensors", code=1))
    assert main(["convert", "a.safetensors", "out"]) == 2
    texts.append(capsys.readouterr().err)
    for text in texts:
        assert "[31mred" in text
        assert text.replace("\n", "").isprintable()


def test_inspect_of_what_cannot_be_planned_says_so(folder, capsys):
    convert.save_safetensors("a.safetensors", {"a": np.ones(2), "a.b": np.ones(2)})
    out = run(capsys, "inspect", "a.safetensors")
    assert "convert asks:\n  state_dict must give each path one parameter" in out


def test_inspect_says_what_looks_alike_once_for_all_layers(folder, capsys):
    tensors = {
        f"layers.{n}.{name}": tensor
        for n in range(12)
        for name, tensor in attention("attn").items()
    }
    tensors |= {f"layers.{n}.attn.q_norm.weight": normal(4) for n in range(12)}
    convert.save_safetensors("normed.safetensors", tensors)
    out = run(capsys, "inspect", "normed.safetensors")
    assert out.count("norms of queries and keys") == 2  # in the table, and asked
    assert re.search(r"layers\.\*\.attn +q_norm\.weight: norms .* 12 ", out)
    assert main(["convert", "normed.safetensors", "out"]) == 2
    err = capsys.readouterr().err
    assert err.count("norms of queries") == 1 and "and 8 more" in err


def options(text):
    """Returns the options that a message says, as a shell would take them."""
    return shlex.split(" ".join(re.findall(r"--[\w-]+ '.*?'", text)))


def test_all_is_asked_in_one_line_that_can_be_pasted(folder, capsys):
    tensors = model() | {
        "whisper.q_proj.weight": normal(8, 8),
        "steps": np.arange(3),
        "features.0.weight": normal(4, 3, 2),
        "features.1.weight": normal(4),
        "features.3.weight": normal(4, 4, 2),
        "bn.running_mean": normal(8),
        "bn.empty": normal(0),
    }
    convert.save_safetensors("more.safetensors", tensors)
    assert main(["convert", "more.safetensors", "out"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    sections = re.split(r" \(\d\) ", err)
    assert sections[0] == "flax-mha: state_dict must leave no doubt (say it), but"
    assert len(sections) == 8
    said = [option.replace("=N", "=2") for option in options(err)]
    out = run(capsys, "convert", "more.safetensors", "out", *said)
    assert out.startswith("wrote out: ")
    run(capsys, "verify", "more.safetensors", "out")


def test_convert_says_how_many_attention_layers_there_are(folder, capsys):
    out = run(capsys, "convert", "model.safetensors", "converted", *OPTIONS)
    assert "wrote converted: 12 parameters; attention layers: 2\n" in out
    convert.save_safetensors("norm.safetensors", {"norm.weight": normal(4)})
    out = run(capsys, "convert", "norm.safetensors", "norm")
    assert "wrote norm: 1 parameters; attention layers: none\n" in out


def test_a_number_of_heads_that_contradicts_config_json_is_told(folder, capsys):
    (folder / "config.json").write_text('{"num_attention_heads": 4}')
    out = run(capsys, "convert", "model.safetensors", "flax", *OPTIONS)
    assert (
        "config.json says other numbers of heads: model.layers.0.self_attn 4, not 2, "
        "model.layers.1.self_attn 4, not 2\n" in out
    )
    out = run(capsys, "convert", "model.safetensors", "same", *OPTIONS[2:])
    assert "says other" not in out


def test_biases_that_were_not_there_stay_away_or_come_back_if_told(folder, capsys):
    whisper = {f"{n}.weight": normal(8, 8) for n in ("q_proj", "k_proj", "v_proj")}
    whisper |= {"out_proj.weight": normal(8, 8), "out_proj.bias": normal(8)}
    whisper |= {f"{n}.bias": normal(8) for n in ("q_proj", "v_proj")}
    convert.save_safetensors("whisper.safetensors", whisper)
    out = run(capsys, "convert", "whisper.safetensors", "flax", "--num-heads", "2")
    assert "zeros for biases that PyTorch's layers lack: k_proj.bias\n" in out
    run(capsys, "verify", "whisper.safetensors", "flax")
    params, conversion = convert.load_params("flax")
    params["in_proj_bias"][1] += 1
    convert.save_params("flax", params, conversion, overwrite=True)
    assert main(["export", "flax", "back.safetensors"]) == 2
    err = capsys.readouterr().err
    assert "by --all-biases, for a layer that has them), but no longer zero" in err
    run(capsys, "export", "flax", "back.safetensors", "--all-biases")
    assert "k_proj.bias" in convert.read_state_dict("back.safetensors")
    out = run(capsys, "diff", "whisper.safetensors", "flax", code=1)
    assert re.search(r"k_proj\.bias +only in B", out)


@pytest.mark.parametrize("converted", ["converted", "converted.safetensors"])
def test_there_and_back(folder, capsys, converted):
    out = run(capsys, "convert", "model.safetensors", converted, *OPTIONS)
    assert out.startswith(f"wrote {converted}: 12 parameters; attention layers: 2\n")
    reports = run(capsys, "verify", "model.safetensors", converted)
    assert (
        len(re.findall(r"model\.layers\.\d\.self_attn +2 +\d\.\de-1\d", reports)) == 2
    )
    run(capsys, "export", converted, "back.safetensors")
    back = convert.read_state_dict("back.safetensors")
    assert back.keys() == model().keys()
    for name, tensor in model().items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(back[name], tensor)
    for other in ("back.safetensors", converted):
        out = run(capsys, "diff", "model.safetensors", other)
        assert out == "12 tensors are equal, 0 are not\n"


def test_a_model_without_attention_layers(folder, capsys):
    names = ("query", "key", "value")
    tensors = {f"bert.{name}.weight": normal(8, 8) for name in names}
    convert.save_safetensors("bert.safetensors", tensors)
    out = run(capsys, "inspect", "bert.safetensors")
    assert "no attention layers found\n" in out and "\n3 tensors" in out
    assert re.search(r"bert +no out\.weight for the output", out)
    kinds = options(out[out.index("convert asks:") :])
    assert kinds[:2] == ["--kind", r"bert\.query=kernel"] and len(kinds) == 6
    run(capsys, "convert", "bert.safetensors", "converted", *kinds)
    out = run(capsys, "verify", "bert.safetensors", "converted")
    assert out == "no attention layers; 3 tensors are equal bit for bit\n"


def test_convert_has_the_options_of_plan_tree(folder, capsys):
    run(
        capsys,
        *("convert", "model.safetensors", "converted", "--prefix", "model"),
        *("--num-heads", "4", "--num-heads", r".*layers\.0.*=2"),
        *("--rename", "layers=blocks", "--rename", "blocks.1=last"),
        *("--kind", r".*\.embed=kernel", "--ignore", r".*norm\.bias"),
    )
    params, conversion = convert.load_params("converted")
    assert {layer.path: layer.num_heads for layer in conversion.layers} == {
        "blocks_0/self_attn": 2,
        "last/self_attn": 4,
    }
    assert params["embed"]["kernel"].shape == (WIDTH, 5)
    assert params.keys() == {"blocks_0", "last", "embed", "norm"}
    assert params["norm"].keys() == {"scale"}


def test_convert_stacks_layers(folder, capsys):
    stack = ["--stack", "model.layers"]
    run(capsys, "convert", "model.safetensors", "converted", *OPTIONS, *stack)
    params, _ = convert.load_params("converted")
    weight = params["model"]["layers"]["self_attn"]["in_proj_weight"]
    assert weight.shape == (2, 3, HEADS, WIDTH // HEADS, WIDTH)
    run(capsys, "verify", "model.safetensors", "converted")


def test_verify_finds_interleaved_heads(folder, capsys):
    run(capsys, "convert", "model.safetensors", "converted", *OPTIONS)
    params, conversion = convert.load_params("converted")
    layer = params["model"]["layers_1"]["self_attn"]
    weight = layer["in_proj_weight"]
    layer["in_proj_weight"] = weight.swapaxes(1, 2).reshape(weight.shape)
    convert.save_params("converted", params, conversion, overwrite=True)
    out = run(capsys, "verify", "model.safetensors", "converted", code=1)
    assert "'model.layers.1.self_attn' by" in out
    assert "tensors that differ: model.layers.1.self_attn.in_proj_weight" in out
    assert "layers.0" not in out


def test_diff_names_what_differs(folder, capsys):
    left = {
        "only_left": normal(2),
        "shape": normal(2, 3),
        "dtype": np.ones(2, "float32"),
        "numbers": np.array([1.0, 2.0, np.nan, np.inf]),
        "nan": np.array([1.0, 2.0]),
        "same": np.array([np.nan, -np.inf]),
    }
    right = {
        "only_right": normal(2),
        "shape": normal(3, 2),
        "dtype": np.ones(2, "float16"),
        "numbers": np.array([1.0, 2.5, np.nan, np.inf]),
        "nan": np.array([1.0, np.nan]),
        "same": np.array([np.nan, -np.inf]),
    }
    convert.save_safetensors("a.safetensors", left)
    convert.save_safetensors("b.safetensors", right)
    lines = run(capsys, "diff", "a.safetensors", "b.safetensors", code=1).splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines[3:-2])
    assert {name: text.strip() for name, text in rows.items()} == {
        "dtype": "float32 and float16",
        "nan": "1 of 2 elements, by up to nan",
        "numbers": "1 of 4 elements, by up to 5.0e-01",
        "only_left": "only in A",
        "only_right": "only in B",
        "shape": "(2, 3) and (3, 2)",
    }
    assert lines[-1] == "1 tensors are equal, 6 are not"


def test_diff_compares_parameters_without_a_conversion_by_their_paths(folder, capsys):
    for name, number in (("a", 1.0), ("b", 1.5)):
        convert.save_params(name, {"dense": {"kernel": np.full((2, 2), number)}})
    out = run(capsys, "diff", "a", "b", code=1)
    assert re.search(r"dense/kernel +4 of 4 elements, by up to 5\.0e-01", out)


ERRORS = {
    "no_file": (["inspect", "none.safetensors"], "none.safetensors"),
    "broken": (["inspect", "broken.safetensors"], "is not a whole safetensors file"),
    "other_file": (["inspect", "notes.txt"], "is cut off, or no file of P"),
    "neither": (
        ["diff", "notes.txt", "notes.txt"],
        "Taken for what convert wrote, 'notes.txt' is not a whole safetensors file",
    ),
    "no_num_heads": (
        ["convert", "model.safetensors", "out", *OPTIONS[2:]],
        "state_dict must leave no doubt (say it), but 'model.layers.0.self_attn' "
        "(embed_dim 8), 'model.layers.1.self_attn' (embed_dim 8) must have a number of "
        "heads, which no tensor records (there is no config.json): "
        r"--num-heads 'model\.layers\.\d+\.self_attn=N'",
    ),
    "num_heads_twice": (
        ["convert", "model.safetensors", "out", *OPTIONS, "--num-heads", "4"],
        "--num-heads must be given once for each pattern, got 2 and 4 for '.*'.",
    ),
    "kind_twice": (
        ["convert", "model.safetensors", "out", *OPTIONS, *OPTIONS[2:]],
        "--kind must be given once for each pattern, got embedding and embedding for",
    ),
    "attention_of_something_else": (
        ["convert", "model.safetensors", "out", "--kind", "model=attention"],
        "--kind must have patterns that match a whole name, got 'model'",
    ),
    "empty": (
        ["convert", "empty.safetensors", "out"],
        "but extra.weight must have elements, as Orbax writes no empty arrays (let OUT "
        "end in .safetensors): --ignore 'extra\\.weight'",
    ),
    "wrong_num_heads": (
        ["convert", "model.safetensors", "out", "--num-heads", "3"],
        "--num-heads must divide embed_dim 8",
    ),
    "unclear": (
        ["convert", "model.safetensors", "out", "--num-heads", "2"],
        "(say it), but model.embed.weight may be a Linear's or an Embedding's: "
        "--kind 'model\\.embed=embedding' or \"kernel\"",
    ),
    "exists": (
        ["convert", "model.safetensors", "plain.safetensors", *OPTIONS],
        "'plain.safetensors' exists; --overwrite replaces it",
    ),
    "onto_itself": (
        ["convert", "model.safetensors", "./model.safetensors", *OPTIONS, OVERWRITE],
        "'model.safetensors' must be apart from 'model.safetensors', which is read",
    ),
    "onto_itself_by_a_link": (
        ["convert", "model.safetensors", "link.safetensors", *OPTIONS, OVERWRITE],
        "'link.safetensors' must be apart from 'model.safetensors'",
    ),
    "into_itself": (
        ["convert", "hub", "hub/flax", *OPTIONS],
        "'hub/flax' must be apart from 'hub'",
    ),
    "around_itself": (
        ["convert", "hub/model.safetensors", "hub", *OPTIONS, OVERWRITE],
        "'hub' must be apart from 'hub/model.safetensors'",
    ),
    "export_onto_itself": (
        ["export", "converted.safetensors", "converted.safetensors", OVERWRITE],
        "'converted.safetensors' must be apart from 'converted.safetensors'",
    ),
    "export_into_itself": (
        ["export", "converted", "converted/back.safetensors"],
        "'converted/back.safetensors' must be apart from 'converted'",
    ),
    "converted_twice": (
        ["convert", "plain.safetensors", "out"],
        "but is written by `flax-mha convert`: `flax-mha export` turns it back",
    ),
    "folder_converted_twice": (
        ["inspect", "converted"],
        "but is an Orbax checkpoint: `flax-mha export` turns it back",
    ),
    "nothing_left": (
        ["convert", "model.safetensors", "out", "--ignore", ".*"],
        "nothing is left to convert: see --prefix and --ignore",
    ),
    "other_heads": (
        ["verify", "model.safetensors", "other_heads"],
        "'other_heads/flax_mha.json' has no conversion of its parameters: ",
    ),
    "pipe": (["inspect", "pipe"], "path must be a file or folder, got 'pipe'."),
    "pipe_as_out": (["verify", "model.safetensors", "pipe"], "got 'pipe'."),
    "no_out": (["verify", "model.safetensors", "no"], "must be a file or folder, got"),
    "nothing_to_export": (["export", "no", "b.safetensors"], "a file or folder, got"),
    "link_to_itself": (
        ["convert", "model.safetensors", "loop", *OPTIONS, OVERWRITE],
        "'loop' is a link that leads to itself.",
    ),
    "capitals": (
        ["convert", "model.safetensors", "out.SAFETENSORS", *OPTIONS],
        "path must end in .safetensors for a file, or be a folder's",
    ),
    "exists_whatever_is_asked": (
        ["convert", "model.safetensors", "plain.safetensors"],
        "'plain.safetensors' exists; --overwrite replaces it",
    ),
    "no_folder": (["convert", "model.safetensors", "none/out", *OPTIONS], "none"),
    "pattern": (
        ["convert", "model.safetensors", "out", *OPTIONS, "--ignore", "("],
        "ignore must have regular expressions",
    ),
    "replacement": (
        ["convert", "model.safetensors", "out", *OPTIONS, "--rename", r"a=\9"],
        "rename",
    ),
    "not_converted": (
        ["verify", "model.safetensors", "model.safetensors"],
        "must be written by `flax-mha convert`",
    ),
    "no_record": (
        ["export", "plain.safetensors", "out.safetensors"],
        "without a record of how they were converted",
    ),
    "export_ending": (["export", "converted", "out.pt"], "must end in .safetensors"),
}


@pytest.mark.parametrize("argv, message", ERRORS.values(), ids=ERRORS)
def test_an_error_is_told_and_leaves_nothing(folder, capsys, argv, message):
    (folder / "broken.safetensors").write_bytes(b"\x00" * 20)
    (folder / "notes.txt").write_text("notes")
    convert.save_params("plain.safetensors", {"a": np.ones(2)})
    empty = {"extra.weight": np.ones((8, 0)), "extra.bias": np.ones(8)}
    convert.save_safetensors("empty.safetensors", empty)
    (folder / "link.safetensors").symlink_to("model.safetensors")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "hub").mkdir()
    convert.save_safetensors("hub/model.safetensors", model())
    for name in {"converted", "converted.safetensors", "other_heads"} & set(argv):
        run(capsys, "convert", "model.safetensors", name, *OPTIONS)
    if "other_heads" in argv:
        record = folder / "other_heads" / "flax_mha.json"
        text = record.read_text()
        record.write_text(text.replace('"num_heads": 2', '"num_heads": 3'))
    before = files_below(folder)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flax-mha: ") and err.count("\n") == 1
    assert message in err
    assert files_below(folder) == before


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "read_state_dict", interrupt)
    assert main(["inspect", "model.safetensors"]) == 130
    assert capsys.readouterr().err == "flax-mha: interrupted\n"


def test_closed_stdout_is_no_traceback(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", "model.safetensors"]) == 0


def test_export_says_what_was_left_out(folder, capsys):
    ignore = ["--ignore", "head.steps"]
    run(capsys, "convert", "model.safetensors", "converted", *OPTIONS, *ignore)
    out = run(capsys, "export", "converted", "back.safetensors")
    assert "without what convert was told to ignore: head.steps\n" in out


def test_long_lists_are_cut_short(folder, capsys):
    run(capsys, "convert", "model.safetensors", "converted", *OPTIONS)
    other = {name: tensor + 1 for name, tensor in model().items()}
    convert.save_safetensors("other.safetensors", other)
    out = run(capsys, "verify", "other.safetensors", "converted", code=1)
    assert out.endswith("model.embed.weight; and 2 more\n")


def test_verify_with_another_model_is_no_crash(folder, capsys):
    run(capsys, "convert", "model.safetensors", "converted", *OPTIONS)
    convert.save_safetensors("other.safetensors", attention("model.layers.0.self_attn"))
    out = run(capsys, "verify", "other.safetensors", "converted", code=1)
    assert "model.layers.1.self_attn.in_proj_weight" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "COMMAND"),
        (["train"], "invalid choice"),
        (["convert", "a", "b", "--num-heads", "many"], "'many' must be N or PATTERN=N"),
        (["convert", "a", "b", "--num-heads", "=4"], "'=4' must be N or PATTERN=N"),
        (["convert", "a", "b", "--rename", "a"], "'a' must be PATTERN=VALUE"),
    ],
)
def test_wrong_usage_is_code_2(capsys, argv, message):
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["inspect"], ["convert"], ["verify"], ["export"], ["diff"]]
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as raised:
        main([*command, "--help"])
    assert raised.value.code == 0
    out = capsys.readouterr().out
    assert "usage: flax-mha" in out
    if command in ([], ["convert"]):
        assert "examples:\n  flax-mha " in out


def test_as_a_program(folder):
    convert.save_safetensors("other.safetensors", {"a": np.ones(2)})
    command = [sys.executable, "-m", "flax_mha", "diff"]
    done = subprocess.run(
        [*command, "model.safetensors", "other.safetensors"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout.endswith("0 tensors are equal, 13 are not\n")


def test_broken_orbax_checkpoint_is_one_message(folder, capsys):
    run(capsys, "convert", "model.safetensors", "converted", *OPTIONS)
    (folder / "converted" / "manifest.ocdbt").write_bytes(b"broken")
    done = subprocess.run(
        [sys.executable, "-m", "flax_mha", "verify", "model.safetensors", "converted"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "flax-mha: 'converted' is a broken Orbax checkpoint." in done.stderr
    assert "Traceback" not in done.stderr  # of TensorStore's threads


def test_progress_bar_ends_when_all_tensors_are_read(folder):
    checkpoint = convert.read_state_dict("model.safetensors")
    progress = Progress(console=Console(file=io.StringIO()))
    watched = _commands._Watched(checkpoint, progress, "reading")
    convert.plan_tree(watched, HEADS, kinds={r".*\.embed": "embedding"})
    (task,) = progress.tasks
    total = sum(array.nbytes for array in model().values())
    assert (task.completed, task.total) == (0, total)  # planning reads nothing
    assert len([*watched.values()]) == 12
    assert len([*watched.values()]) == 12  # nothing is counted twice
    assert task.completed == total


def test_long_work_shows_its_progress_on_a_terminal_alone(folder, capsys, monkeypatch):
    commands = (
        ["convert", "model.safetensors", "converted", *OPTIONS],
        ["verify", "model.safetensors", "converted"],
        ["export", "converted", "back.safetensors"],
        ["diff", "model.safetensors", "back.safetensors"],
    )
    shown = []

    def progress():
        console = Console(file=io.StringIO(), force_terminal=True)
        shown.append(Progress(console=console))
        return shown[-1]

    for command in commands:
        run(capsys, *command, *[OVERWRITE] * (command[0] in ("convert", "export")))
    monkeypatch.setattr(_commands, "_progress", progress)
    for command in commands:
        run(capsys, *command, *[OVERWRITE] * (command[0] in ("convert", "export")))
    counted = [
        {task.description: task.completed for task in one.tasks if task.total}
        for one in shown
    ]
    total = sum(array.nbytes for array in model().values())
    assert counted == [
        {"reading": total},
        {"comparing": total},
        {"writing": total},
        {"comparing": 12},
    ]
