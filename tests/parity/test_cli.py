"""The command line, on PyTorch's own files."""

import re

import torch

from flax_mha._cli import main
from flax_mha.convert import load_params


def test_a_training_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.MultiheadAttention(8, 2)
    average = torch.nn.MultiheadAttention(8, 2)
    states = dict(model=model.state_dict(), model_ema=average.state_dict(), epoch=3)
    torch.save(states, "training.pt")
    assert main(["inspect", "training.pt"]) == 0
    assert "Taken from 'model'" in capsys.readouterr().out

    wrapper = ["--wrapper", "model_ema"]
    assert main(["convert", "training.pt", "flax", "--num-heads", "2", *wrapper]) == 0
    params, _ = load_params("flax")
    weight = params["in_proj_weight"].reshape(24, 8)
    assert torch.equal(torch.tensor(weight), average.in_proj_weight)
    assert main(["verify", "training.pt", "flax"]) == 1  # with the other
    hint = "Each of model, model_ema may be the --wrapper."
    assert hint in capsys.readouterr().out
    assert main(["verify", "training.pt", "flax", *wrapper]) == 0
    assert re.search(r" 2 +\d\.\de-1\d +\d\.\de-1\d +yes", capsys.readouterr().out)
