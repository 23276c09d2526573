"""What the training steps of a run on a mesh compile and copy, from the second on.

`python -m parity_tests.sharding.copies_of_steps` prints how many programs the first step compiles, how many the second
to the fifth, and what the guard says of a planted fault: a batch that the host hands to the program as it is.
"""

import jax
import numpy as np

from jax_moe import MakeMoEConfig
from moe_train.configs.settings import TrainConfig
from moe_train.learners.jax_learner import JaxLearner
from moe_train.learners.models import FreshMakeMoE

MESH = "data=2,expert=2,sequence=2"
SIZES = MakeMoEConfig(vocab_size=11, block_size=8, model_dim=8, num_heads=2, num_layers=2, num_experts=4)


def main() -> None:
    """Prints three lines."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    tokens_BT1 = np.random.default_rng(0).integers(0, 11, (8, 9)).astype(np.int32)
    learner = JaxLearner(TrainConfig(batch_size=8, steps=9, mesh=MESH), FreshMakeMoE(SIZES))
    compiled.clear()
    learner.train_step(0, tokens_BT1)
    first = len(compiled)
    with jax.transfer_guard("disallow"):  # a batch that is put on its devices by name is allowed
        for step in range(1, 5):
            learner.train_step(step, tokens_BT1)
    print(first, len(compiled) - first, sep="\n")
    learner._put = lambda tokens: tokens  # type: ignore[method-assign]
    try:
        with jax.transfer_guard("disallow"):
            learner.train_step(5, tokens_BT1)
    except jax.errors.JaxRuntimeError as error:
        print(f"found: {error}")


if __name__ == "__main__":
    main()
