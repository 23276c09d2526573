"""A checkpoint of makeMoE (PyTorch) into JAX, trained there for some steps, and back into the PyTorch model.

Here the checkpoint is made first, by `torch_ref.MakeMoE`, which has the names of the original project. With a file of
your own leave `make_checkpoint` out. Needs the extra `torch`.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

import jax_moe
import torch_ref

CONFIG = jax_moe.MakeMoEConfig(vocab_size=65, model_dim=32, num_heads=4, num_layers=2, num_experts=4)


def make_checkpoint(path: Path) -> None:
    """What a PyTorch training loop saves."""
    torch.manual_seed(0)
    torch.save(torch_ref.MakeMoE(CONFIG).state_dict(), path)


def silent(tokens_BT: np.ndarray) -> torch_ref.Randomness:
    """No noise: makeMoE's stays on at evaluation, and two programs cannot draw the same by themselves."""
    shape = (CONFIG.num_layers, *tokens_BT.shape, CONFIG.num_experts)
    return torch_ref.Randomness(noise_BTE=torch.zeros(shape))


def torch_logits(state: dict, tokens_BT: np.ndarray) -> np.ndarray:
    """The answer of the PyTorch model, loaded strictly."""
    original = torch_ref.MakeMoE(CONFIG).eval()
    original.load_state_dict(state, strict=True)
    with torch.no_grad():
        return original(torch.tensor(tokens_BT), randomness=silent(tokens_BT)).numpy()


def main() -> None:
    """Compares both sides before and after the steps in JAX."""
    tokens_BT = np.random.default_rng(0).integers(0, 65, (4, 33))
    with tempfile.TemporaryDirectory() as folder:
        path, back = Path(folder) / "model.pt", Path(folder) / "trained.pt"
        make_checkpoint(path)
        # a file holds no top-k, capacity or dropout: without these arguments the published values are assumed, and said
        model = jax_moe.load(path, top_k=2, capacity_factor=1.0, dropout=0.1)
        graphdef, params, others = nnx.split(model, nnx.Param, ...)

        def logits_of(params: nnx.State) -> jax.Array:  # without a key the model draws nothing
            return nnx.merge(graphdef, params, others)(jnp.asarray(tokens_BT[:, :-1]))

        jax_logits = jax.jit(logits_of)
        state = torch.load(path, weights_only=True)
        error = np.abs(jax_logits(params) - torch_logits(state, tokens_BT[:, :-1])).max()
        print(f"{len(state)} tensors; largest difference of a logit {error:.1e}")
        assert error < 1e-4, "the same weights give the same logits"

        optimizer = optax.adamw(1e-3)

        @jax.jit
        def step(params: nnx.State, state: optax.OptState) -> tuple:
            def loss_of(params: nnx.State) -> jax.Array:
                return jax_moe.next_token_loss(logits_of(params), jnp.asarray(tokens_BT[:, 1:]))

            loss, gradients = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        moments = optimizer.init(params)
        for number in range(30):
            params, moments, loss = step(params, moments)
            if number % 10 == 0 or number == 29:
                print(f"step {number:2} in JAX: loss {float(loss):.3f}")
        jax_moe.save(nnx.merge(graphdef, params, others), back)

        trained = torch.load(back, weights_only=True)
        assert trained.keys() == state.keys(), "the names of the original, masks included"
        error = np.abs(jax_logits(params) - torch_logits(trained, tokens_BT[:, :-1])).max()
        print(f"back in PyTorch: the same {len(trained)} names; largest difference of a logit {error:.1e}")
        assert error < 1e-4, "the trained model is the same in PyTorch"


if __name__ == "__main__":
    main()
