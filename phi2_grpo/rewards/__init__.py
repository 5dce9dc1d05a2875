"""Reward functions and reward models, and the collapse metrics that show gaming."""
