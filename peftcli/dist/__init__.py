"""Several processes of one run: how they are started, what they tell each other, and how weights
and gradients are spread over them.
"""
