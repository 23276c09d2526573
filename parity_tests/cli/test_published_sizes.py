"""What `jax-moe inspect` says of published config.json files, their values written by hand: the published totals."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.published import PUBLISHED, V3
from jax_moe.parameters import declared
from jax_moe.porting.families import family_named
from jax_moe.porting.state_dict import abstract_decoder
from moe_cli.sizes import count_parameters
from parity_tests.cli.commands import fails, run


def published(billions: float, counted: int) -> bool:
    """Whether a number of parameters is written so."""
    tenth = 10 ** len(str(billions).partition(".")[2])
    exact = counted / 1e9 * tenth
    return round(billions * tenth) in (round(exact), math.floor(exact))


def test_exact_totals() -> None:
    """Two that their publishers' files hold, to the last parameter; a wrong number is told apart."""
    assert published(46.7, 46_702_792_704) and not published(46.7, 46_802_792_704)
    for name, total in (("Mixtral-8x7B", 46_702_792_704), ("Kimi-K2", 1_026_408_232_448)):
        values = PUBLISHED[name][0]
        config = family_named(values["model_type"]).config(values)
        assert count_parameters(declared(abstract_decoder(config)), config).total == total


def test_experts_that_return_their_input_have_no_parameters() -> None:
    """Two more choices for the router, of 4096 numbers each in 32 layers; as many experts with weights as before."""
    values = PUBLISHED["Mixtral-8x7B"][0]
    config = family_named(values["model_type"]).config(values)
    with_two = dataclasses.replace(config.moe, num_experts=10, identity_experts=2)
    layers = tuple(dataclasses.replace(layer, ffn=with_two) for layer in config.layers)
    before, after = (
        count_parameters(declared(abstract_decoder(one)), one)
        for one in (config, dataclasses.replace(config, layers=layers))
    )
    assert after.experts == before.experts
    assert after.total - before.total == after.active - before.active == 32 * 2 * 4096


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both totals to the digits that were published, rounded or cut off; some leave the embedding out of the active."""
    values, total, active = PUBLISHED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    told = run(capsys, "inspect", file)
    found = re.search(r"([\d,]+) parameters, ([\d,]+) of them active", told)
    assert found is not None, told
    counted, used = (int(said.replace(",", "")) for said in found.groups())
    assert published(total, counted), told
    assert published(active, used) or published(active, used - values["vocab_size"] * values["hidden_size"]), told
    assert "files: none, this is the config.json alone" in told


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "bert"}, "config.json: model_type='bert': must be one of "),
    ({"kv_lora_rank": "many"}, "config.json: kv_lora_rank='many': must be an integer"),
    ({"torch_dtype": "int3"}, "config.json: dtype='int3': must be one of float64"),
    ({"quantization_config": {"quant_method": "magic"}}, "quantization_config.quant_method='magic': must be one of"),
])
def test_what_is_wrong_is_said_in_a_line(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3 | changes))
    assert message in fails(capsys, "inspect", tmp_path / "config.json")
