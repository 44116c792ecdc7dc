"""The training loop and what it stands on: streams of randomness, objectives, metrics, checkpoints,
logs.
"""
