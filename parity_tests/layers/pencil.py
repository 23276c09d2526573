"""The pencil story: layers so small that every answer is worked by hand. Numbers only; no framework is imported.

A token is four numbers: its logits for three experts, and its name. The router reads the logits as they are (kernel =
identity), and expert e does one thing: it writes the token's name into place e of the answer. So a layer's answer for
the token named n is simply (n * weight of expert 0, n * weight of expert 1, n * weight of expert 2, 0): what it was
sent where, with which weight. Logits are logarithms of simple fractions, so that a softmax gives the fractions back.

The three friends, in twentieths, each going to two experts:

    Ann   (name 20): 9 10 1   -> first expert 1 (10/20), then expert 0 (9/20)
    Bob   (name 40): 8  7 5   -> first expert 0 (8/20),  then expert 1 (7/20)
    Cleo  (name 60): 12 3 5   -> first expert 0 (12/20), then expert 2 (5/20)

Capacity is 3 * 2 / 3 = 2 slots, and all three want expert 0, so one of them is turned away:

    in token order            Ann and Bob came first           Cleo is dropped
    first choices first       expert 0 is Ann's second choice  Ann is dropped
    highest probability first 12/20 > 9/20 > 8/20              Bob is dropped

What they send when nobody is dropped: Ann (9, 10, 0), Bob (16, 14, 0), Cleo (36, 0, 15).

Long because it is one story with all its numbers.
"""

import dataclasses
from dataclasses import dataclass, field
from math import exp, log

import numpy as np

from jax_moe.config.moe import AroundConfig, BalanceConfig, CapacityConfig, ExpertConfig, MoEConfig, RouterConfig

ANN, BOB, CLEO = (9, 10, 1, 20), (8, 7, 5, 40), (12, 3, 5, 60)
FRIENDS = (ANN, BOB, CLEO)
PLAIN_EXPERT = ExpertConfig(activation="identity", gated=False)


def sequence(*people: tuple[float, ...]) -> list[list[float]]:
    """Tokens whose softmax over the experts is in the proportions given; the last number is the name."""
    return [[*(log(share / sum(person[:-1])) for share in person[:-1]), person[-1]] for person in people]


def layer(num_experts: int = 3, top_k: int = 2, **settings: object) -> MoEConfig:
    """The pencil layer under a contract; dropless unless a capacity is given."""
    return MoEConfig(
        model_dim=num_experts + 1, expert_dim=1, num_experts=num_experts, top_k=top_k,
        **{"expert": PLAIN_EXPERT, **settings},  # type: ignore[arg-type]
    )


def pencil_weights(config: MoEConfig) -> dict[str, np.ndarray]:
    """Router = identity on the logits; expert e writes the name into place e. Names as in `jax_moe.MoE`."""
    E, D = config.num_networks, config.model_dim
    up_EDF, down_EFD = np.zeros((E, D, 1)), np.zeros((E, 1, D))
    up_EDF[:, D - 1, 0] = 1
    down_EFD[np.arange(E), 0, np.arange(E)] = 1
    weights = {"experts.up": up_EDF, "experts.down": down_EFD}
    if not config.router.network_dim and config.router.product_keys == "none":
        weights["router.kernel"] = np.eye(D, config.num_experts)
    if config.router.bias:
        weights["router.bias"] = np.zeros(config.num_experts)
    return weights


@dataclass(frozen=True)
class Scenario:
    """One story: a contract, tokens, and what must come out."""

    name: str
    config: MoEConfig
    x_BTD: list
    answer_BTD: list  # worked by hand
    dropped: float = 0.0  # share of choices dropped
    weights: dict = field(default_factory=dict)  # on top of `pencil_weights`
    mask_BT: list | None = None
    tokens_BT: list | None = None
    state_BTI: list | None = None  # the router's, of the mixture before

    def all_weights(self) -> dict[str, np.ndarray]:
        return {
            **pencil_weights(self.config),
            **{name: np.asarray(value, float) for name, value in self.weights.items()},
        }


def weight_story(
    name: str, proportions: list[float], answer: list[float], router: RouterConfig, **extra: object
) -> Scenario:
    """One token named 60 with the given raw logits, dropless."""
    config = layer(len(proportions), router=router)
    return Scenario(name, config, [[[*proportions, 60.0]]], [[[*answer, 0.0]]], **extra)  # type: ignore[arg-type]


# --- how logits become weights --------------------------------------------------------------------------------------
HALF_THIRD_SIXTH = [log(1 / 2), log(1 / 3), log(1 / 6)]  # softmax: 1/2, 1/3, 1/6
THREE_ONE = [log(3.0), 0.0, log(1 / 3)]  # sigmoid: 3/(3+1) = 3/4, 1/2, 1/4
SQUARES = [log(exp(4.0) - 1), log(exp(1.0) - 1), log(exp(0.25) - 1)]  # softplus: 4, 1, 1/4; square roots: 2, 1, 1/2
EQUAL = [0.0, 0.0, 0.0]
# sigmoids 9/10, 1/10 | 6/10, 5/10: the best expert is in the first cluster, the best pair (11/10 > 10/10) in the second
TWO_CLUSTERS = [log(9.0), log(1 / 9), log(1.5), 0.0]
V3 = RouterConfig(score="sigmoid", num_clusters=2, top_clusters=1)
BIASED_MAX = dataclasses.replace(V3, cluster_score="max", correction_bias=True)
SIGMOID = RouterConfig(score="sigmoid")
MIXER = RouterConfig(order="sparse_mixer", mixer_eps=0.3)
# (logits, replayed choices, answer): 0 is not near ln 4, so its share is 0, and of the others ln 4 has 4 of 4 + 2;
# and ln 2, taken first as near, has 2 of 4 + 2
MIXED = [([log(4.0), log(2.0), 0.0], [2, 0], [40, 0, 0]), ([log(4.0), log(2.0), 0.0], [1, 0], [60, 20, 0])]

WEIGHTS = [
    # 60 * (1/2, 1/3)
    weight_story("softmax over all", HALF_THIRD_SIXTH, [30, 20, 0], RouterConfig()),
    # 1/2 + 1/3 = 5/6; 60 * (3/5, 2/5)
    weight_story("divided by the sum", HALF_THIRD_SIXTH, [36, 24, 0], RouterConfig(renormalise="sum")),
    # 5/6 + eps 5/6 = 5/3; 60 * (3/10, 1/5)
    weight_story(
        "divided by sum + eps", HALF_THIRD_SIXTH, [18, 12, 0], RouterConfig(renormalise="eps", renormalise_eps=5 / 6)
    ),
    # the sum 5/6 is less than 5/3: 60 * (3/10, 1/5); and more than 1/2: 60 * (3/5, 2/5)
    weight_story(
        "divided by 5/3 at least", HALF_THIRD_SIXTH, [18, 12, 0],
        RouterConfig(renormalise="floor", renormalise_eps=5 / 3),
    ),
    weight_story(
        "divided by 1/2 at least", HALF_THIRD_SIXTH, [36, 24, 0],
        RouterConfig(renormalise="floor", renormalise_eps=1 / 2),
    ),
    # the scale comes after: 2.5 * 60 * (3/5, 2/5)
    weight_story("scaled", HALF_THIRD_SIXTH, [90, 60, 0], RouterConfig(renormalise="sum", scale=2.5)),
    # and without renormalising: 2.5 * 60 * (1/2, 1/3)
    weight_story("scaled alone", HALF_THIRD_SIXTH, [75, 50, 0], RouterConfig(scale=2.5)),
    # softmax over the chosen logits ln 3, ln 1: 60 * (3/4, 1/4)
    weight_story("select, then softmax", THREE_ONE, [45, 15, 0], RouterConfig(order="select_then_softmax")),
    # ln 2 is half of ln 4 below it, 0 all of it, and all of ln 2: the shares are 4 of 4 + 2, and 2 of 2
    weight_story("sparse mixer", [log(4.0), log(2.0), 0.0], [40, 60, 0], MIXER),
    # below 0 the lower one is the measure: ln 2 of ln 4 and 3 ln 2 of 4 ln 2 below the best, 2 ln 2 of 4 ln 2 below
    # the second; 1/2 of 1/2 + 1/4, and 1/4 of 1/4 + 1/16
    weight_story("sparse mixer below 0", [-log(2.0), -log(4.0), -log(16.0)], [40, 48, 0], MIXER),
    # nothing is below 0 by any share of 0: one of three, then one of two
    weight_story("sparse mixer at 0", EQUAL, [20, 30, 0], MIXER),
    # and with logits of half the size
    weight_story(
        "logits halved", [2 * log(3.0), 0.0, -2 * log(3.0)], [45, 30, 0],
        dataclasses.replace(SIGMOID, logit_scale=0.5),
    ),
    # 60 * (3/4, 1/2)
    weight_story("sigmoid", THREE_ONE, [45, 30, 0], SIGMOID),
    # 3/4 + 1/2 = 5/4; 60 * (3/5, 2/5)
    weight_story("sigmoid, by the sum", THREE_ONE, [36, 24, 0], dataclasses.replace(SIGMOID, renormalise="sum")),
    # 60 * (2, 1)
    weight_story("square root of softplus", SQUARES, [120, 60, 0], RouterConfig(score="sqrt_softplus")),
    # 60 * (2/3, 1/3)
    weight_story(
        "sqrt softplus, by the sum", SQUARES, [40, 20, 0], RouterConfig(score="sqrt_softplus", renormalise="sum")
    ),
    # nobody is better than anybody: the two lowest indices win
    weight_story("three-way tie", EQUAL, [20, 20, 0], RouterConfig()),
    weight_story("tie for the second place", [0.0, log(2.0), 0.0], [15, 30, 0], RouterConfig()),
    # choice scores 3/4 - 1/2, 1/2, 1/4 + 1: experts 2 and 1; their weights are the scores themselves, 1/4 and 1/2
    weight_story(
        "correction bias chooses only", THREE_ONE, [0, 30, 15], dataclasses.replace(SIGMOID, correction_bias=True),
        weights={"router.correction_bias": [-0.5, 0, 1]},
    ),
    # compared are ln 3, 0, -ln 3 + 0.6, not 3/4, 1/2, 1/4 + 0.6: experts 0 and 1, with sigmoids 3/4 and 1/2
    weight_story(
        "the choice by logits", THREE_ONE, [45, 30, 0],
        dataclasses.replace(SIGMOID, correction_bias=True, selection="logit"),
        weights={"router.correction_bias": [0, 0, 0.6]},
    ),
    # token 1 of the table goes to experts 2 and 0, whatever the scores: 1/2 and 1/6 weigh them
    weight_story(
        "a table of tokens", HALF_THIRD_SIXTH, [30, 0, 10], RouterConfig(table_tokens=2),
        weights={"router.expert_table": [[0, 1], [2, 0]]}, tokens_BT=[[1]],
    ),
    # product keys: halves (ln 3, 0) and (ln 2, 0) make ln 6, ln 3, ln 2, 0: shares 6, 3, 2, 1 of 12, and of 60
    weight_story(
        "product keys", [log(3.0), 0.0, log(2.0), 0.0], [30, 15, 0, 0], RouterConfig(product_keys="own"),
        weights={"router.keys": np.eye(5, 4)},
    ),
    # a router bias does count: logits ln 3, 0, 0 + ln 2 -> experts 0 and 2, 3/5 and 2/5
    weight_story(
        "router bias", [log(3.0), 0.0, 0.0], [36, 0, 24], RouterConfig(order="select_then_softmax", bias=True),
        weights={"router.bias": [0, 0, log(2.0)]},
    ),
    # the cluster with the best expert: 9/10, 1/10
    weight_story("clusters by their best", TWO_CLUSTERS, [54, 6, 0, 0], dataclasses.replace(V3, cluster_score="max")),
    # the cluster with the best pair: 6/10, 5/10
    weight_story("clusters by their best two", TWO_CLUSTERS, [0, 0, 36, 30], V3),
    # choice scores 9/10, 1/10 - 2/10 | -inf, -inf: the second choice is expert 1, its weight 1/10
    weight_story(
        "others filled with -inf", TWO_CLUSTERS, [54, 6, 0, 0], BIASED_MAX,
        weights={"router.correction_bias": [0, -0.2, 0, 0]},
    ),
    # choice scores 9/10, -1/10 | 0, 0: the second choice leaves the cluster; expert 2, the lower index, has weight 6/10
    weight_story(
        "others filled with 0", TWO_CLUSTERS, [54, 0, 36, 0], dataclasses.replace(BIASED_MAX, cluster_fill="zero"),
        weights={"router.correction_bias": [0, -0.2, 0, 0]},
    ),
]


# --- who is dropped -------------------------------------------------------------------------------------------------
ALL = [[9, 10, 0, 0], [16, 14, 0, 0], [36, 0, 15, 0]]
KEEPS_TOKEN = [[9, 10, 0, 0], [16, 14, 0, 0], [0, 0, 15, 0]]
KEEPS_CHOICE = [[0, 10, 0, 0], [16, 14, 0, 0], [36, 0, 15, 0]]
KEEPS_PROBABILITY = [[9, 10, 0, 0], [0, 14, 0, 0], [36, 0, 15, 0]]
# slots by choice (2 = dropped); the experts are Ann 1 0, Bob 0 1, Cleo 0 2
SLOTS = {
    "token": [[0, 0], [1, 1], [2, 0]],
    "choice": [[0, 2], [0, 1], [1, 0]],
    "probability": [[0, 1], [2, 1], [0, 0]],  # the order is Cleo 12, Ann 10, Ann 9, Bob 8, Bob 7, Cleo 5
    "batch": [[0, 2], [1, 1], [0, 0]],  # the order is Cleo 12, Ann 10, Bob 8, then Cleo 5, Ann 9, Bob 7
}
CHOICES = [[1, 0], [0, 1], [0, 2]]
ONE = [sequence(*FRIENDS)]
TWICE = [sequence(*FRIENDS), sequence(*FRIENDS)]
BY_SEQUENCE = CapacityConfig(group="sequence")
# Three guests choose two experts each: Ada 0 and 2 (10 and 9 twentieths), Ben 2 and 1 (8 and 7), Cy 0 and 1 (12 and 5).
# With one slot an expert each order serves others:
GUESTS = [sequence((10, 1, 9, 20), (5, 7, 8, 40), (12, 5, 3, 60))]
SERVED = {
    "token": [[10, 0, 9, 0], [0, 14, 0, 0], [0] * 4],  # Ada 0 and 2, Ben 1
    "choice": [[10, 0, 0, 0], [0, 14, 16, 0], [0] * 4],  # Ada 0, Ben 2; then Ben 1 before Cy
    "probability": [[0, 0, 9, 0], [0, 14, 0, 0], [36, 0, 0, 0]],  # Cy 12, Ada 9 before Ben 8, Ben 7 before Cy 5
    "batch": [[0] * 4, [0, 0, 16, 0], [36, 15, 0, 0]],  # first Cy 0 (before Ada), Ben 2; then Cy 1 before Ada and Ben
}
STRANGER = (18, 1, 1, 1000)  # goes to expert 0 before everybody


def drop_story(name: str, answer: list, dropped: float, capacity: CapacityConfig, **extra: object) -> Scenario:
    x_BTD, moe = extra.pop("x_BTD", ONE), layer(capacity=capacity, **extra.pop("settings", {}))
    return Scenario(name, moe, x_BTD, answer, dropped, **extra)  # type: ignore[arg-type]


DROPS = [
    Scenario("nobody is dropped without a capacity", layer(), ONE, [ALL]),
    drop_story("token order", [KEEPS_TOKEN], 1 / 6, CapacityConfig()),
    drop_story("first choices first", [KEEPS_CHOICE], 1 / 6, CapacityConfig(priority="choice")),
    drop_story("highest probability first", [KEEPS_PROBABILITY], 1 / 6, CapacityConfig(priority="probability")),
    *(
        drop_story(f"one slot, {capacity.priority} order", [SERVED[capacity.priority]], 1 / 2, capacity, x_BTD=GUESTS)
        for capacity in (CapacityConfig(factor=0.5, priority=priority) for priority in SERVED)  # type: ignore[arg-type]
    ),
    # one slot more and everybody fits: floor(2 * 3/2) = 3
    drop_story("capacity one higher", [ALL], 0, CapacityConfig(factor=1.5)),
    # one slot, token order: Ann has both her experts, Bob neither, Cleo expert 2: three of six dropped
    drop_story("capacity one", [[[9, 10, 0, 0], [0, 0, 0, 0], [0, 0, 15, 0]]], 1 / 2, CapacityConfig(factor=0.5)),
    # floor(2 * 2/5) = 0 slots: everything is dropped, the answer is nothing
    drop_story("capacity zero", [[[0] * 4] * 3], 1, CapacityConfig(factor=0.4, below_one="drop_all")),
    # GShard: Cleo lost 12 of 17, so her 5 gets all the weight: 60 * 1.
    # Ann: 20 * 9/19, 20 * 10/19; Bob: 40 * 8/15, 40 * 7/15
    drop_story(
        "survivors take over", [[[180 / 19, 200 / 19, 0, 0], [64 / 3, 56 / 3, 0, 0], [0, 0, 60, 0]]], 1 / 6,
        CapacityConfig(renormalise_after_drop=True),
    ),
    # and are scaled as before: 2 * the line above
    drop_story(
        "survivors take over, scaled", [[[360 / 19, 400 / 19, 0, 0], [128 / 3, 112 / 3, 0, 0], [0, 0, 120, 0]]], 1 / 6,
        CapacityConfig(renormalise_after_drop=True), settings={"router": RouterConfig(scale=2.0)},
    ),
    # a stranger who is only padding stands first in the queue of expert 0 and must not take a slot; floor(4 * 2/3) = 2
    drop_story(
        "padding takes no slot", [[[0] * 4, *KEEPS_TOKEN]], 1 / 6, CapacityConfig(),
        x_BTD=[sequence(STRANGER, *FRIENDS)],
        mask_BT=[[False, True, True, True]],
    ),
    # without the mask he does: expert 0 serves him and Ann, expert 1 him and Ann; Bob has nothing, Cleo only expert 2
    drop_story(
        "a stranger takes two slots", [[[900, 50, 0, 0], [9, 10, 0, 0], [0] * 4, [0, 0, 15, 0]]], 3 / 8,
        CapacityConfig(),
        x_BTD=[sequence(STRANGER, *FRIENDS)],
    ),
    # each sequence has its own two slots
    drop_story("groups are sequences", [KEEPS_TOKEN, KEEPS_TOKEN], 1 / 6, BY_SEQUENCE, x_BTD=TWICE),
    # six tokens share four slots: expert 0 serves Ann, Bob, Cleo and the second Ann; the second Bob and Cleo lose it
    drop_story(
        "the batch is one group", [ALL, [[9, 10, 0, 0], [0, 14, 0, 0], [0, 0, 15, 0]]], 2 / 12, CapacityConfig(),
        x_BTD=TWICE,
    ),
    # groups of four in flat order, floor(4 * 2/3) = 2 slots each: Ann Bob Cleo Ann | Bob Cleo and nobody.
    # Expert 0 drops Cleo and the second Ann; expert 1 serves Ann and Bob, drops the second Ann; the short group none
    drop_story(
        "groups of four", [KEEPS_TOKEN, [[0] * 4, [16, 14, 0, 0], [36, 0, 15, 0]]], 3 / 12,
        CapacityConfig(group="fixed", group_size=4), x_BTD=TWICE,
    ),
]


# --- experts --------------------------------------------------------------------------------------------------------
# ReLU experts that subtract 1 before they answer, so that it matters where the weight goes; weights 1/2 and 1/4 of 4
MINUS_ONE = {"experts.up_bias": [[-1]] * 3, "experts.down_bias": [[0] * 4] * 3}
NONLINEAR = ExpertConfig(activation="relu", gated=False, bias=True)
FOUR = [sequence((2, 1, 1, 4))]

EXPERTS = [
    # 1/2 * relu(4 - 1), 1/4 * relu(4 - 1)
    Scenario("weight on the output", layer(expert=NONLINEAR), FOUR, [[[3 / 2, 3 / 4, 0, 0]]], weights=MINUS_ONE),
    # relu(4 * 1/2 - 1), relu(4 * 1/4 - 1)
    Scenario(
        "weight on the input", layer(expert=dataclasses.replace(NONLINEAR, weight_on="input")), FOUR, [[[1, 0, 0, 0]]],
        weights=MINUS_ONE,
    ),
    # the shared expert writes half the name into the last place, whoever else was chosen: 60 / 2
    Scenario(
        "shared expert", layer(expert=dataclasses.replace(PLAIN_EXPERT, shared_dim=1)),
        [[[*HALF_THIRD_SIXTH, 60.0]]], [[[30, 20, 0, 30]]],
        weights={"shared.up": [[[0], [0], [0], [1]]], "shared.down": [[[0, 0, 0, 0.5]]]},
    ),
    # its gate reads the first logit, ln 3: sigmoid 3/4, times 60 / 2. Routing weights are sigmoids too, 3/4 and 1/2
    Scenario(
        "shared expert behind its gate",
        layer(router=SIGMOID, expert=dataclasses.replace(PLAIN_EXPERT, shared_dim=1, shared_gate=True)),
        [[[*THREE_ONE, 60.0]]], [[[45, 30, 0, 22.5]]],
        weights={
            "shared.up": [[[0], [0], [0], [1]]], "shared.down": [[[0, 0, 0, 0.5]]], "shared_gate": [[1], [0], [0], [0]]
        },
    ),
    # every answer and 7, of a token without a slot too; but nothing at padding
    Scenario(
        "bias on the answer", layer(answer_bias=True, capacity=CapacityConfig(factor=1.5)), [sequence(CLEO, ANN)],
        [[[0] * 4, [16, 17, 7, 7]]], weights={"answer_bias": [7, 7, 7, 7]}, mask_BT=[[False, True]],
    ),
    Scenario(
        "bias on the answer of dropped tokens",
        layer(answer_bias=True, capacity=CapacityConfig(factor=0.4, below_one="drop_all")), ONE, [[[7, 0, 0, 1]] * 3],
        1, weights={"answer_bias": [7, 0, 0, 1]},
    ),
    # a token without a slot still meets the shared expert: Cleo loses expert 0 and keeps 60 / 2
    Scenario(
        "dropped tokens meet the shared expert",
        layer(expert=dataclasses.replace(PLAIN_EXPERT, shared_dim=1), capacity=CapacityConfig()), ONE,
        [[[9, 10, 0, 10], [16, 14, 0, 20], [0, 0, 15, 30]]], 1 / 6,
        weights={"shared.up": [[[0], [0], [0], [1]]], "shared.down": [[[0, 0, 0, 0.5]]]},
    ),
]


def and_itself(share: float, token: list[float], answer: list[float]) -> list[float]:
    """The answer of networks, and that share of the token, which an expert returned as it was."""
    return [share * own + told for own, told in zip(token, answer, strict=True)]


# The last of three experts returns its input: half of the token, and 1/3 of what expert 1 says
MIRROR = [log(1 / 6), log(1 / 3), log(1 / 2), 60.0]
# With one slot an expert: Ann and Bob want expert 0, and Bob is dropped; all three look into the mirror, nobody is
# turned away there
ANN_2, BOB_2, CLEO_2 = sequence((9, 1, 10, 20), (8, 5, 7, 40), (3, 5, 12, 60))
MIRRORED = [
    and_itself(10 / 20, ANN_2, [9, 0, 0, 0]), and_itself(7 / 20, BOB_2, [0, 0, 0, 0]),
    and_itself(12 / 20, CLEO_2, [0, 15, 0, 0]),
]
IDENTITY = [
    Scenario(
        "an expert that returns its input", layer(identity_experts=1), [[MIRROR]],
        [[and_itself(1 / 2, MIRROR, [0, 20, 0, 0])]],
    ),
    Scenario(
        "no queue before the mirror", layer(identity_experts=1, capacity=CapacityConfig(factor=0.5)),
        [[ANN_2, BOB_2, CLEO_2]], [MIRRORED], 1 / 6,
    ),
    # what is left of Bob's weights is all of them: 7/7
    Scenario(
        "no queue before the mirror, renormalised",
        layer(identity_experts=1, capacity=CapacityConfig(factor=0.5, renormalise_after_drop=True)),
        [[BOB_2, ANN_2, BOB_2]],
        [[and_itself(7 / 15, BOB_2, [40 * 8 / 15, 0, 0, 0]), and_itself(1, ANN_2, [0] * 4), BOB_2]], 2 / 6,
    ),
]
# A token of one number. It is mapped to (1, 7), whose mean square is 25: with eps 11 its rms is 6, and scaled by (2, 1)
# it becomes (2/6, 7/6). The only expert says 9 * (1/9, 7/18) = (1, 7/2); scaled by (1, 2) that is (1, 7), normed again
# (1/6, 7/6), and mapped back 1 + 7 = 8. The shared expert sees the token and says 10: 18, whose square and 252 are
# 24^2, so the last norm with its scale 4 leaves 3.
AROUND_WEIGHTS = {
    "router.kernel": [[0]], "latent_in": [[1, 7]], "experts.up": [[[6], [6]]], "experts.down": [[[1 / 9, 7 / 18]]],
    "latent_out": [[6], [6]], "shared.up": [[[1]]], "shared.down": [[[10]]],
}
NORM_SCALES = {"latent_norm.scale": [1, 0], "experts.answer_scale": [0, 1], "output_norm.scale": [4]}
MAPPED = AroundConfig(latent_dim=2)
NORMED = AroundConfig(
    latent_dim=2, latent_norm="rms_centered", latent_norm_eps=11.0, output_norm="rms", output_norm_eps=252.0
)
ANSWER = dataclasses.replace(PLAIN_EXPERT, shared_dim=1, answer_norm="rms_of_scaled", answer_norm_eps=11.0)


def around_story(name: str, around: AroundConfig, expert: ExpertConfig, answer: float, scales: dict) -> Scenario:
    """The token 1, which the only expert answers with weight 1."""
    config = MoEConfig(
        model_dim=1, expert_dim=1, num_experts=1, top_k=1, around=around, expert=expert,
    )
    return Scenario(name, config, [[[1.0]]], [[[answer]]], weights={**AROUND_WEIGHTS, **scales})


AROUND = [
    # 6 * (1 + 7) = 48; 6 * 48 * (1/9 + 7/18) = 144, and 10
    around_story("mapped", MAPPED, dataclasses.replace(PLAIN_EXPERT, shared_dim=1), 154, {}),
    around_story("mapped and normed", NORMED, ANSWER, 3, NORM_SCALES),
    # the scale itself in the place of 1 more than it: (2/6, 7/6) again; (1, 7/2) has mean square 53/8, 9 with eps 19/8:
    # (1/3, 7/6), and mapped back 9
    around_story(
        "other norms", dataclasses.replace(NORMED, latent_norm="rms", output_norm="none"),
        dataclasses.replace(ANSWER, answer_norm="rms", answer_norm_eps=19 / 8), 19,
        {"latent_norm.scale": [2, 1], "experts.answer_scale": [1, 1]},
    ),
]
# Two numbers, (3, 4): mean square 25/2, and 100 with eps 175/2, so over their rms of 10 they are (3, 4) / 10. The
# router reads these times (10, 20) over the root of 2, (3, 8) / sqrt(2); its columns sqrt(2) * ln(2) * (1/3, 0) and
# (0, 1/4) make logits ln 2 and 2 ln 2: shares 1/3 and 2/3, times each expert's factor 9 and 12 weights 3 and 8.
# What the experts read is normed and scaled by (10, 10): (3, 4). The first says (3 + 4) * (1, 0), the second (0, 7):
# 3 * 7 = 21 and 8 * 7 = 56, whose mean square is (441 + 3136) / 2 = 1788.5, and 1876 with the eps: the root is
# 43.31..; scaled by 2. The shared expert reads (3, 4) / 10 * (20, 20) = (6, 8), says 14 * (1, 1), normed with mean
# square 196, 283.5 with the eps, and scaled by (1, 3).
GEMMA = dataclasses.replace(PLAIN_EXPERT, shared_dim=1)
GEMMA_WEIGHTS = {
    "router.kernel": [[2**0.5 * log(2.0) / 3, 0], [0, 2**0.5 * log(2.0) / 4]], "router.input_scale": [10, 20],
    "router.expert_scale": [9, 12], "input_norm.scale": [10, 10], "routed_norm.scale": [2, 2],
    "shared_input_norm.scale": [20, 20], "shared_norm.scale": [1, 3],
    "experts.up": [[[1], [1]]] * 2, "experts.down": [[[1, 0]], [[0, 1]]],
    "shared.up": [[[1], [1]]], "shared.down": [[[1, 1]]],
}
PARTS_NORMED = AroundConfig(
    input_norm="rms_wide", routed_norm="rms_wide", shared_input_norm="rms_wide", shared_norm="rms_wide", norm_eps=87.5,
)
AROUND.append(Scenario(
    "a norm before the router, factors of experts, norms of parts",
    MoEConfig(
        model_dim=2, expert_dim=1, num_experts=2, top_k=2, expert=GEMMA, around=PARTS_NORMED,
        router=RouterConfig(renormalise="sum", input_norm=True, input_norm_eps=87.5, expert_scale=True),
    ),
    [[[3.0, 4.0]]],
    [[[2 * 21 / 1876**0.5 + 14 / 283.5**0.5, 2 * 56 / 1876**0.5 + 3 * 14 / 283.5**0.5]]], weights=GEMMA_WEIGHTS,
))
# Two shared experts that the router weighs: their logits are those of experts 0 and 2. Sigmoids 3/4, 1/2 of the chosen
# and 3/4, 1/4 of the shared make 9/4: 1/3, 2/9, 1/3, 1/9, and nine times that. The shared say a half and a quarter of
# 60.
WEIGHED = Scenario(
    "shared experts that the router weighs",
    layer(
        router=RouterConfig(score="sigmoid", renormalise="sum", shared_experts=2, learned_scale=True),
        expert=dataclasses.replace(PLAIN_EXPERT, shared_dim=1),
    ),
    [[[*THREE_ONE, 60.0]]], [[[180, 120, 0, 3 * 30 + 15]]],
    weights={
        "router.kernel": [[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0] * 5], "router.learned_scale": [9],
        "shared_experts.up": [[[0], [0], [0], [1]]] * 2,
        "shared_experts.down": [[[0, 0, 0, 0.5]], [[0, 0, 0, 0.25]]],
    },
)
# A network of two numbers. The token named 60 gives (3, 0) and a bias (3, 1); the state before it, (2, 6) times
# (0, 1/2), makes that (3, 4), whose mean square is 25/2 and 100 with the eps: over 10 and times 1000 it is (300, 400).
# GELU leaves what is far above 0 and takes what is far below: (300, 400 - 1000) becomes (300, 0), and (300 - 200, 50)
# stays. So the logits are (100, 50) times the last map: shares 1/2, 1/3 and 1/6, and by the bias the second choice is
# the last expert, which answers nothing.
NETWORK = Scenario(
    "a network with a state, and an expert that answers nothing",
    layer(
        identity_experts=1, identity_answer="nothing",
        router=RouterConfig(network_dim=2, network_norm_eps=87.5, takes_state=True, correction_bias=True),
    ),
    [[[0, 0, 0, 60.0]]], [[[30, 0, 0, 0]]],
    weights={
        "router.network.down": [[0, 0], [0, 0], [0, 0], [0.05, 0]], "router.network.down_bias": [0, 1],
        "router.network.state_scale": [0, 0.5], "router.network.norm": [1000, 1000],
        "router.network.first": [[1, 0], [0, 1]], "router.network.first_bias": [0, -1000],
        "router.network.second": [[1, 0], [0, 0]], "router.network.second_bias": [-200, 50],
        "router.network.out": [[log(1 / 2) / 100, log(1 / 3) / 100, 0], [0, 0, log(1 / 6) / 50]],
        "router.correction_bias": [0, -1, 0],
    },
    state_BTI=[[[2.0, 6.0]]],
)
# Of all tokens' numbers in a row the first half is (ln 3, 0), (0, 0) and the second (ln 2, 0), (0, 0): the first token
# has both of the story of product keys, the second none, and goes to the lowest two with a quarter each
IN_A_ROW = Scenario(
    "product keys of all tokens in a row", layer(4, router=RouterConfig(product_keys="flat")),
    [[[log(3.0), 0, 0, 0, 60.0], [log(2.0), 0, 0, 0, 40.0]]], [[[30, 15, 0, 0, 0], [10, 10, 0, 0, 0]]],
    weights={"router.keys": np.eye(5, 4)},
)
EXPERTS += [*IDENTITY, *AROUND, WEIGHED, NETWORK, IN_A_ROW]

# One expert, so its weight is 1. A token is (gate, up); clamp 2, offset 1: min(gate, 2) * (clip(up, -2, 2) + 1).
# Columns: gate, up, answer, d answer / d gate, d answer / d up. AT the bound the gradient is the inner one.
CLAMPED = MoEConfig(
    model_dim=2, expert_dim=1, num_experts=1, top_k=1,
    expert=ExpertConfig(activation="identity", clamp=2.0, up_offset=1.0),
)
CLAMPED_WEIGHTS = {
    "router.kernel": np.zeros((2, 1)), "experts.gate": np.array([[[1.0], [0]]]), "experts.up": np.array([[[0.0], [1]]]),
    "experts.down": np.array([[[1.0, 0]]]),
}
CLAMP_TABLE = [
    (1, 1, 2, 2, 1),
    (2, 1, 4, 2, 2),  # gate at its bound: the gradient is whole
    (3, 1, 4, 0, 2),  # beyond: none
    (-5, 1, -10, 2, -5),  # the gate has no lower bound
    (1, 2, 3, 3, 1),  # up at the upper bound
    (1, 5, 3, 3, 0),
    (1, -2, -1, -1, 1),  # up at the lower bound
    (1, -5, -1, -1, 0),
    (2, 2, 6, 3, 2),  # both at the bound
]
# relu(gate)^2, bounded by 1/2, times up within 1/2: gate, up, answer. 0.36 is within, though 0.6 is not
AFTER = dataclasses.replace(
    CLAMPED, expert=ExpertConfig(activation="relu2", clamp=0.5, clamp_on="activation"),
)
AFTER_TABLE = [
    (0.5, 0.25, 0.0625), (0.6, 0.5, 0.18), (0.6, 3, 0.18), (2, 0.5, 0.25), (-3, 0.5, 0), (2, -5, -0.25),
]
# ln 3 has sigmoid 3/4 and, within 2, tanh(ln 3 / 2) = 1/2: 1 * 3/4; 4 ln 2 within 4 is 4 * 3/5; -4 ln 2 is -12/5
SOFT_CAPPED = dataclasses.replace(CLAMPED, expert=ExpertConfig(gate_softcap=2.0, up_softcap=4.0))
SOFT_TABLE = [
    (log(3.0), 4 * log(2.0), 9 / 5), (log(3.0), -4 * log(2.0), -9 / 5), (0, 1, 0), (-log(3.0), 4 * log(2.0), -3 / 5),
]
# beside the same expert unbounded and halved: gate * up within 2, and 1/2 gate * up
BESIDE = dataclasses.replace(
    CLAMPED,
    expert=ExpertConfig(activation="identity", clamp=2.0, shared_dim=1, shared_clamp=None, shared_scale=0.5),
)
BESIDE_TABLE = [(1, 1, 1.5), (3, 1, 3.5), (3, 4, 10), (1, -5, -4.5)]
SHARED_WEIGHTS = {f"shared.{name}": CLAMPED_WEIGHTS[f"experts.{name}"] for name in ("gate", "up", "down")}
# gpt-oss: gate ln 3 / 1.702 has sigmoid(1.702 gate) = 3/4; (up + 1) * gate * 3/4
QUICK_GATE = log(3.0) / 1.702


# --- losses ---------------------------------------------------------------------------------------------------------
# The friends' choices: expert 0 three of six, expert 1 two, expert 2 one. Mean softmax: 29, 20, 11 sixtieths.
LOAD = [3 / 6, 2 / 6, 1 / 6]
PROB = [29 / 60, 20 / 60, 11 / 60]
BALANCE = 1.15  # 3 * (29/120 + 20/180 + 11/360) = 3 * 138/360
BALANCE_K = 2.3  # f sums to k = 2
IMPORTANCE_CV2 = 96 / 289  # given 29, 17, 5 twentieths: mean 17, variance (144 + 0 + 144) / 3 = 96
LOAD_CV2 = 1 / 6  # 3, 2, 1: mean 2, variance 2/3; 2/3 / 4
# The balance loss of other scores: two tokens, three experts, two choices each.
# Sigmoid of ln 3, 0, -ln 3: 3/4, 1/2, 1/4, over their sum 3/2: 1/2, 1/3, 1/6. The other token is the mirror image.
# Alone the first token has f = (1/2, 1/2, 0), so the loss 3 * (1/4 + 1/6) = 5/4; both have P = (1/3, 1/3, 1/3).
# Square roots of softplus 2, 1, 1/2 over 7/2: 4/7, 2/7, 1/7; alone: 3 * (2/7 + 1/7) = 9/7
SCORED = {
    "sigmoid": (THREE_ONE, [1 / 2, 1 / 3, 1 / 6], 5 / 4),
    "sqrt_softplus": (SQUARES, [4 / 7, 2 / 7, 1 / 7], 9 / 7),
}
# DeepSeek-V3's loss of each sequence: THREE_ONE twice, with f = (1/2, 1/2, 0) and P = (1/2, 1/3, 1/6): 5/4; THREE_ONE
# and its mirror image, with f = (1/4, 1/2, 1/4): 1. Over all four tokens f = (3/8, 1/2, 1/8) and P = (5/12, 1/3, 1/4).
# A bias sends everybody to experts 1 and 2, f = (0, 1/2, 1/2): 3 * (1/6 + 1/12) = 3/4, and 1 again.
SEQUENCES = [[[*THREE_ONE, 1.0], [*logits, 1.0]] for logits in (THREE_ONE, THREE_ONE[::-1])]
SEQUENCES_BIAS = {"router.correction_bias": np.asarray([0.0, 9.0, 9.0])}
BY_SEQUENCE = [
    ("scores", "sequence", None, (5 / 4 + 1) / 2),
    ("scores", "batch", None, 17 / 16),
    ("choices", "sequence", None, (3 / 4 + 1) / 2),
    ("scores", "sequence", [[True, True], [True, False]], 5 / 4),
    ("scores", "sequence", [[False, False], [True, True]], 1),
]
# The correction bias: loads, bias before, and what is added at rate 1/4, recentred or not. Means 2 and 2/3; the third
# has shares of 1/3, whose sums are rounded: the counts say that nothing moves.
BIASES = [
    ([4, 1, 1, 2], [0, 0, 0, 1], [-1 / 4, 1 / 4, 1 / 4, 0], [-5 / 16, 3 / 16, 3 / 16, -1 / 16]),
    ([1, 1, 0], [3, 2, 1], [-1 / 4, -1 / 4, 1 / 4], [-1 / 6, -1 / 6, 1 / 3]),
    ([333, 333, 333], [1, 1, 1], [0, 0, 0], [0, 0, 0]),
]
# E / S * p_j * (f_j - sum_e f_e p_e); the inner sum is 48/120 for Ann, 43/120 for Bob, 47/120 for Cleo
BALANCE_GRADIENT = [
    [9 / 200, -1 / 30, -7 / 600],
    [17 / 300, -7 / 800, -23 / 480],
    [13 / 200, -7 / 800, -9 / 160],
]
HF_BALANCE = BalanceConfig(f_sums_to="k")
# Everybody equally often: three tokens, each expert twice; uniform softmaxes up to a tilt that cancels
BALANCED = [sequence((4, 4, 1, 1), (1, 4, 4, 1), (4, 1, 4, 1))]


# --- Soft MoE -------------------------------------------------------------------------------------------------------
# Tokens (1, 0) and (0, 1), two experts of one slot, phi = [[ln 2, ln 3], [0, 0]]: logits (ln 2, ln 3) and (0, 0).
# Slots read (over tokens): slot 0: 2/3, 1/3; slot 1: 3/4, 1/4. Tokens read (over slots): 2/5, 3/5 and 1/2, 1/2.
# Expert 0 multiplies by 1, expert 1 by 10: answers (2/3, 1/3) and (15/2, 5/2).
SOFT_X = [[[1.0, 0.0], [0.0, 1.0]]]
SOFT_PHI = [[[log(2.0)], [log(3.0)]], [[0.0], [0.0]]]
SOFT_FACTORS = (1.0, 10.0)
SOFT_DISPATCH = [[2 / 3, 3 / 4], [1 / 3, 1 / 4]]  # [token][slot]
SOFT_COMBINE = [[2 / 5, 3 / 5], [1 / 2, 1 / 2]]
SOFT_ANSWER = [[[4 / 15 + 9 / 2, 2 / 15 + 3 / 2], [1 / 3 + 15 / 4, 1 / 6 + 5 / 4]]]
# with the residual around each expert the factors are 2 and 11: (4/3, 2/3) and (33/4, 11/4)
SOFT_RESIDUAL = [[[8 / 15 + 99 / 20, 4 / 15 + 33 / 20], [2 / 3 + 33 / 8, 1 / 3 + 11 / 8]]]
# with the second token masked both slots read the first alone: (1, 0) and (10, 0); 2/5 + 30/5 in the first place
SOFT_MASKED = [[6.4, 0.0]]
# each expert's share of the combine weights, the mean entropy of each token's in nats, and the shares' CV^2
SOFT_LOAD = [9 / 20, 11 / 20]
SOFT_ENTROPY = (log(5.0) - (2 * log(2.0) + 3 * log(3.0)) / 5 + log(2.0)) / 2
SOFT_CV2 = 1 / 100  # mean 1/2, deviations 1/20
SOFT_MASKED_STATS = ([2 / 5, 3 / 5], log(5.0) - (2 * log(2.0) + 3 * log(3.0)) / 5, 1 / 25)


# --- the next token's loss ------------------------------------------------------------------------------------------
# Two tokens, three positions: probabilities 3/4, 1/4 and 1/2, 1/2 and 9/10, 1/10; the targets have 3/4, 1/2 and 1/10
LOSS_LOGITS = [[[log(3.0), 0.0], [5.0, 5.0], [log(9.0), 0.0]]]
LOSS_TARGETS = [[0, 1, 1]]
LOSS = log(80 / 3) / 3
LOSS_MASK, LOSS_MASKED = [[True, True, False]], log(8 / 3) / 2


# --- attention ------------------------------------------------------------------------------------------------------
# Four heads of one number. Head 0 asks with feature 0, is asked with feature 1, and answers feature 2 into place 0.
# The second token asks 1; the keys are 2 ln 2 and 0; the values 15 and 30. The first token sees only itself.
ATTENTION_X = [[[5.0, 2 * log(2.0), 15.0, 0.0], [1.0, 0.0, 30.0, 0.0]]]
ATTENTION_ANSWER = {
    "head_dim": [15, 18],  # scale 1: 4/5 * 15 + 1/5 * 30
    "model_dim": [15, 20],  # scale 4 ** -1/2 = 1/2: 2/3 * 15 + 1/3 * 30
}
