"""Makes the samples: every kind of checkpoint and run, written by a version into a folder named after it.

    python -m parity_tests.samples.make FOLDER

They are made once per version and kept: `test_samples.py` checks that the present code reads them bit for bit.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import jax_moe
from jax_moe import presets
from jax_moe.porting.checkpoint import Checkpoint, save
from moe_cli.main import main
from parity_tests.porting.decoder_cases import decoder
from parity_tests.porting.porting_cases import make as make_module
from parity_tests.samples.digests import digests
from parity_tests.shared.filled import filled

TEXT = "To be, or not to be, that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 6
RUN = (
    "--block-size", "4", "--batch-size", "4", "--eval-every", "2", "--eval-batches", "1",
    "--checkpoint-every", "2", "--sample-length", "4", "--warmup-steps", "1", "--clip-norm", "1",
)
SMALL = ("--data", "text.txt", "--sample-prompt", "T", "--model-dim", "8", "--num-heads", "2",
         "--num-layers", "2", "--num-experts", "4")
STOP = "import os, signal, moe_train.steps as loop\nsteps = loop.evaluate\n" + (
    "def evaluate(run, step, *rest):\n    row = steps(run, step, *rest)\n"
    "    os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None\n    return row\nloop.evaluate = evaluate\n"
)


def train(*arguments: str, stopped: bool = False) -> None:
    """Runs train.py in a subprocess; `stopped`: a signal ends it after two of its four steps."""
    root = Path(__file__).parent.parent.parent
    code = f"import sys\nsys.argv = ['train.py', *{[*arguments, *RUN, '--steps', '4']!r}]\n"
    code += (STOP if stopped else "") + "from moe_train.loop import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert done.returncode == (130 if stopped else 0)


def write(folder: Path) -> None:
    """Writes all samples, and digests.json with the digest of every array."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    Path("text.txt").write_text(TEXT)
    save(Checkpoint("makemoe", make_module("makemoe"), "abcdefghijk"), Path("makemoe"))
    save(Checkpoint("makemoe_layer", make_module("moe_makemoe", dtype="bfloat16")), Path("makemoe_layer_bf16"))
    save(Checkpoint("mixtral", make_module("moe_mixtral", dtype="float16")), Path("mixtral_fp16"))
    save(Checkpoint("moe", make_module("moe_deepseek")), Path("moe"))
    save(Checkpoint("soft_moe", make_module("soft_moe")), Path("soft_moe_orbax"), storage="orbax")
    switch = presets.switch(8, 6, 4, capacity_factor=None)
    save(Checkpoint("switch", filled(lambda: jax_moe.MoE(switch))), Path("switch"))
    for family, dtype in (("qwen2_moe", "float32"), ("granitemoe", "bfloat16")):
        jax_moe.save_pretrained(decoder(family, dtype), family, model_type=family, max_shard_bytes=4000)
        assert main(["port", family, f"{family}_orbax"]) == 0
    train("--out", "run_finished", *SMALL)
    train("--out", "run_stopped", *SMALL, stopped=True)
    train("--out", "run_torch", *SMALL, "--framework", "torch", stopped=True)
    np.save("tokens.npy", np.tile(np.arange(11, dtype=np.int32), 20))
    tuned = ("--pretrained", "qwen2_moe", "--data", "tokens.npy", "--sample-prompt", "1")
    train("--out", "tuned_stopped", *tuned, stopped=True)
    _training_file(Path("training.pt"))
    assert main(["port", "training.pt", "training"]) == 0
    for picture in Path().rglob("*.png"):
        picture.unlink()
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        os.chdir(copy)
        found = digests(Path())
    (folder / "digests.json").write_text(json.dumps(found, indent=1) + "\n")


def _training_file(path: Path) -> None:
    import torch

    import torch_ref

    model = torch_ref.MakeMoE(jax_moe.MakeMoEConfig(
        vocab_size=11, block_size=4, model_dim=8, num_heads=2, num_layers=2, num_experts=4, dropout=0.0,
        capacity_factor=None,
    ))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, path)


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute())
