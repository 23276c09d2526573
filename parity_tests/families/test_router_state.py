"""ZAYA1's mixtures in a row: the router of each reads the state that the one before handed on; the first reads none."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference is PyTorch")
transformers = pytest.importorskip("transformers", reason="needs the extra 'hf': transformers")

import jax_moe  # noqa: E402
import torch_ref  # noqa: E402
from parity_tests.families.cases import CASES  # noqa: E402
from parity_tests.families.reference import save_model  # noqa: E402
from parity_tests.shared.compare import check_close  # noqa: E402


def test_two_layers_in_a_row(tmp_path: Path) -> None:
    model = save_model(CASES["zaya"], tmp_path)
    model.config._experts_implementation = "eager"
    layers = [jax_moe.load_moe(tmp_path, i) for i in jax_moe.moe_layers(tmp_path)]
    assert [moe.config.router.takes_state for moe in layers] == [False, True]
    x = np.random.default_rng(3).normal(size=(2, 5, 10)).astype(np.float32)
    theirs, ours, mirrored = torch.from_numpy(x), x, torch.from_numpy(x)
    state = before = mirrored_before = None
    for i, moe in enumerate(layers):
        with torch.no_grad():
            theirs, state = model.model.layers[i].mlp(theirs, state)
            mirror = torch_ref.MoE(moe.config)
            mirror.load_state_dict({n: torch.from_numpy(np.asarray(v)) for n, v in jax_moe.to_torch(moe).items()})
            said = mirror.eval().run(mirrored, router_state_BTI=mirrored_before)
        found = moe.run(ours, router_state_BTI=before)
        ours, before, mirrored, mirrored_before = found.y_BTD, found.router_state_BTI, said.y_BTD, said.router_state_BTI
        wanted = {"y": theirs.numpy(), "state": state.numpy()}
        said_ours = {"y": np.asarray(ours), "state": np.asarray(before)}
        check_close(said_ours, wanted, 4e-6, f"layer {i}")  # measured: 1.1e-6
        mirror_says = {"y": mirrored.numpy(), "state": mirrored_before.numpy()}
        check_close(mirror_says, wanted, 2e-6, f"layer {i}, torch_ref")  # measured: 2.3e-7
    alone = layers[1].run(found.y_BTD)  # the state matters
    assert not np.allclose(alone.router_state_BTI, layers[1].run(found.y_BTD, router_state_BTI=before).router_state_BTI)


def test_a_state_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    save_model(CASES["zaya"], tmp_path)
    first = jax_moe.load_moe(tmp_path, 0)
    with pytest.raises(ValueError, match=r"router_state_BTI: must be None where the router takes no state"):
        first(np.zeros((1, 2, 10), np.float32), router_state_BTI=np.zeros((1, 2, 7), np.float32))
    with pytest.raises(ValueError, match=r"router_state_BTI has shape \(1, 2, 6\): must be \(1, 2, 7\)"):
        jax_moe.load_moe(tmp_path, 1)(
            np.zeros((1, 2, 10), np.float32), router_state_BTI=np.zeros((1, 2, 6), np.float32)
        )
