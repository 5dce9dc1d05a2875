"""Reward functions and reward models, scored and watched for gaming."""
