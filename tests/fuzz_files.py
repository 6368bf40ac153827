"""Files as nobody writes them: `python -m tests.fuzz_files KIND [CORPUS] [OPTIONS]`.

KIND is one of TARGETS, OPTIONS are libFuzzer's, as -max_total_time=3600; CORPUS is a
folder of inputs, to begin with and to add to. It needs atheris, which draws inputs by
the code that they reach. The tests do without: they change seeds at random.

A reader may refuse an input by a ValueError, and do nothing else: whatever else it
raises, imports or runs is a finding, and becomes a test.
"""

import contextlib
import io
import os
import pathlib
import pickle
import sys
import tempfile

import numpy as np
import safetensors
from safetensors.numpy import save

if __name__ == "__main__":
    import atheris

    instrumented = atheris.instrument_imports(["flax_mha", "pickle", "zipfile"])
else:
    instrumented = contextlib.nullcontext()
with instrumented:
    from flax_mha.convert import read_state_dict
    from flax_mha.convert._draft import draft_tree
    from flax_mha.convert._files import safetensors as ours
    from flax_mha.convert._files.source import Source
    from tests.convert.test_pickles import VALUES, named, saved, tensor

MOST = 2**20  # bytes of a tensor that is read
# What readers do that a pickle might be up to.
HARMLESS = (
    "open",
    "compile",
    "os.listdir",
    "os.scandir",
    "object.",
    "pathlib.",
    "builtins.id",
)


def read(path):
    """Reads all that a file holds, and plans what would become of it."""
    try:
        checkpoint = read_state_dict(path)
        for name, spec in checkpoint.specs.items():
            if spec.size * spec.dtype.itemsize < MOST:
                array = checkpoint[name]
                assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        draft_tree(checkpoint, 2)
    except ValueError:
        return


def whole(folder, content):
    """The input is a file."""
    (folder / "a.pt").write_bytes(content)
    read(folder / "a.pt")


def pickled(folder, content):
    """The input is the pickle of an archive that torch.save might have written."""
    storages = {f"_{key}": bytes(range(96)) for key in "012"}
    whole(folder, saved(content, **storages))


def header(folder, content):
    """The input is the header of a safetensors file, and how many bytes follow."""
    text, _, count = content.rpartition(b" ")
    count = int(count) if count.isdigit() and len(count) < 5 else 24
    alike(folder, len(text).to_bytes(8, "little") + text + bytes(count))


def alike(folder, content):
    """The input is a safetensors file, of which the format's library says the same."""
    path = folder / "a.safetensors"
    path.write_bytes(content)
    try:
        theirs = dict(safetensors.deserialize(content))
    except Exception as error:
        theirs = str(error)
    try:
        found, _ = ours.read(Source(path))
    except ValueError as error:
        # Dtypes that NumPy has not, and surrogates, of which it is no judge.
        known = "cannot hold" in str(error) or isinstance(theirs, str)
        assert known, f"{error}, but it is read: {theirs}"
        return
    if isinstance(theirs, str):
        assert "unicode" in theirs or "surrogate" in theirs, theirs
        return
    assert theirs.keys() == found.keys()
    for name, info in theirs.items():
        assert tuple(info["shape"]) == found[name].shape
        if found[name].size < MOST:
            assert found[name].read().tobytes() == bytes(info["data"])
    read(path)


TARGETS = {"file": whole, "pickle": pickled, "safetensors": alike, "header": header}


def seeds(kind):
    """Returns some inputs that are read."""
    turned = tensor(b"0", size=(3, 2), stride=(1, 3))
    half = tensor(b"1", size=(2,), stride=(1,), kind="BFloat16Storage")
    pickles = [named(a=tensor(b"0"), turned=turned, half=half)]
    arrays = {"a": VALUES, "b": [{1}, np.array("x", object)], "c": {"d": VALUES[0]}}
    pickles += [pickle.dumps(arrays, protocol) for protocol in range(2, 6)]
    if kind == "pickle":
        return pickles
    layer = {"a.weight": VALUES, "b": np.zeros((0, 3), "int8"), "c": np.ones(())}
    files = [save(layer, {"format": "pt"}), save({"a.q_proj.weight": VALUES})]
    if kind == "safetensors":
        return files
    if kind == "header":
        ends = [8 + int.from_bytes(file[:8], "little") for file in files]
        return [
            file[8:end] + b" %d" % (len(file) - end)
            for file, end in zip(files, ends, strict=True)
        ]
    zipped = [saved(content, _0=VALUES.tobytes(), _1=bytes(8)) for content in pickles]
    numpy = io.BytesIO()
    np.savez(numpy, a=VALUES, b=VALUES[0])
    return [*files, *zipped, *pickles[1:], numpy.getvalue()]


def main():
    """Lets atheris draw inputs of a kind until it is stopped, or finds something."""
    _, kind, *options = sys.argv
    folder = pathlib.Path(tempfile.mkdtemp())
    if options and not options[0].startswith("-"):
        corpus = pathlib.Path(options[0])
    else:
        corpus = folder / "corpus"
        options.insert(0, str(corpus))
    corpus.mkdir(exist_ok=True)
    for number, content in enumerate(seeds(kind)):
        (corpus / f"seed{number}").write_bytes(content)
        TARGETS[kind](folder, content)  # which imports what is imported when needed
    reading = False

    def watch(event, arguments):
        if reading and not event.startswith(HARMLESS):
            os.write(2, f"{event} {arguments!r:.300}\n".encode())
            os._exit(77)

    def one(content):
        nonlocal reading
        reading = True
        try:
            TARGETS[kind](folder, content)
        finally:
            reading = False

    sys.addaudithook(watch)
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
