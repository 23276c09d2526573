"""A Hugging Face folder, fine-tuned in JAX and loaded again by transformers.

Here the folder holds a tiny random Mixtral. `train/train.py --pretrained FOLDER` does the same with checkpoints,
metrics and resuming; this is the loop by itself. Needs the extras `torch` and `hf`.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

import jax_moe


def make_folder(folder: Path) -> None:
    """What `save_pretrained` of transformers writes."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)


def batch(number: int) -> np.ndarray:
    """Sequences that count on by a step of their own: something to learn."""
    draw = np.random.default_rng(number)
    first_B1, step_B1 = draw.integers(0, 64, (8, 1)), draw.integers(1, 4, (8, 1))
    return (first_B1 + step_B1 * np.arange(17)) % 64


def torch_loss(folder: Path, tokens_BT: np.ndarray) -> float:
    """The loss that transformers computes on the folder, without the balance loss."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return float(model(torch.tensor(tokens_BT), labels=torch.tensor(tokens_BT)).loss)


def main(steps: int = 60) -> None:
    """Fine-tunes and compares the losses of both sides."""
    with tempfile.TemporaryDirectory() as place:
        source, tuned = Path(place) / "source", Path(place) / "tuned"
        make_folder(source)
        decoder = jax_moe.load_pretrained(source)
        graphdef, params, others = nnx.split(decoder, nnx.Param, ...)
        optimizer = optax.adamw(3e-3)

        def loss_of(params: nnx.State, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params, others)
            output = model.run(tokens_BT[:, :-1])
            loss = jax_moe.next_token_loss(output.logits_BTV, tokens_BT[:, 1:])
            balance = jax_moe.pool_balance_loss(output.stats, model.config.moe)
            return loss + model.config.balance_loss_weight * balance, loss

        @jax.jit
        def step(params: nnx.State, state: optax.OptState, tokens_BT: jax.Array) -> tuple:
            gradients, loss = jax.grad(loss_of, has_aux=True)(params, tokens_BT)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        state = optimizer.init(params)
        for number in range(steps):
            params, state, loss = step(params, state, jnp.asarray(batch(number)))
            if number % 20 == 0 or number == steps - 1:
                print(f"step {number:2}: loss {float(loss):.3f}")

        decoder = nnx.merge(graphdef, params, others)
        jax_moe.save_pretrained(decoder, tuned)
        print("written:", ", ".join(sorted(path.name for path in tuned.iterdir())))
        held_out = batch(1000)
        before, after = torch_loss(source, held_out), torch_loss(tuned, held_out)
        ours = float(step(params, state, jnp.asarray(held_out))[2])  # the loss before a step that is not kept
        print(f"transformers on new sequences: loss {before:.3f} before, {after:.3f} after; JAX {ours:.3f}")
        assert after < 0.7 * before, "the model has learned to count"
        assert abs(after - ours) < 1e-4, "transformers computes the loss that JAX computes"


if __name__ == "__main__":
    main()
