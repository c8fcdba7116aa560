"""Reinforcement learning: advantages, losses, rollouts, rewards, guards.

`python -m jaxlm.rl.ppo` and `python -m jaxlm.rl.grpo` are the programs.
"""
