"""Trained adapters as files: Hugging Face peft's format where it has the method, merged models,
model cards.
"""
