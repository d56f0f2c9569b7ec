"""FrozenLake, whose values are exactly known: the chain of a policy, and episodes drawn from it."""

from typing import Any, NamedTuple, cast

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np

from jax_ls.preferences import epsilon_greedy

DISCOUNT, EXPLORATION = 0.97, 0.1
# After so many steps less than 1 % of a reward is left.
HORIZON = 160


class Lake(NamedTuple):
    """A policy on FrozenLake, where ice is slippery: its chain of states, and what is exactly known of it."""

    next_cdf: jax.Array  # (S, S): from each state, the share of next states up to each
    goal: int
    over: jax.Array  # (S,): holes and the goal end an episode
    starts: jax.Array
    features: jax.Array  # (S, 16): row and column, one-hot
    values: np.ndarray


def frozen_lake() -> Lake:
    """The 8 × 8 map of Gymnasium, and its ε-greedy policy on the best action values."""
    table = cast(Any, gymnasium.make("FrozenLake-v1", map_name="8x8", is_slippery=True).unwrapped).P
    states, actions = len(table), len(table[0])
    moves = np.zeros((states, actions, states))
    for state, action in np.ndindex(states, actions):
        for probability, after, _, _ in table[state][action]:
            moves[state, action, after] += probability
    over = np.array([moves[s, :, s].min() == 1 for s in range(states)])
    goal = states - 1
    reward = moves[:, :, goal] * ~over[:, None]
    onward = DISCOUNT * moves * ~over[:, None, None] * ~over[None, None]

    best = np.zeros(states)
    for _ in range(2000):
        best = (reward + onward @ best).max(axis=1)
    policy = np.asarray(epsilon_greedy((reward + onward @ best).round(6).astype(np.float32), EXPLORATION))
    chain = np.einsum("sa,san->sn", policy, onward)
    values = np.linalg.solve(np.eye(states) - chain, np.einsum("sa,sa->s", policy, reward))

    side = int(states**0.5)
    rows, columns = np.divmod(np.arange(states), side)
    features = np.concatenate([np.eye(side)[rows], np.eye(side)[columns]], axis=1).astype(np.float32)
    cdf = np.cumsum(np.einsum("sa,san->sn", policy, moves), axis=1).astype(np.float32)
    starts = np.flatnonzero(~over)
    return Lake(jnp.asarray(cdf), goal, jnp.asarray(over), jnp.asarray(starts), jnp.asarray(features), values)


def returns(lake: Lake, key: jax.Array, episodes: int) -> tuple[jax.Array, jax.Array]:
    """States, evenly spread, and the discounted return of one episode from each."""
    start_key, walk_key = jax.random.split(key)
    first = jax.random.choice(start_key, lake.starts, (episodes,))

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        state, total, weight = carry
        drawn = jax.random.uniform(key, (episodes, 1))
        after = jnp.minimum(jnp.sum(lake.next_cdf[state] < drawn, axis=-1), len(lake.values) - 1)
        after = jnp.where(lake.over[state], state, after)
        arrived = (after == lake.goal) & (state != lake.goal)
        return (after, total + weight * arrived.astype(jnp.float32), weight * DISCOUNT), None

    start = first, jnp.zeros(episodes), jnp.ones(())
    (_, total, _), _ = jax.lax.scan(step, start, jax.random.split(walk_key, HORIZON))
    return first, total
