"""The rooms of `method=hf_peft`, whose recipe is `peftcli/methods/hf_peft.py`.

fields      what a tuner of the installed peft takes, and what of it cannot be had here
wrapping    peft's wrappers out of the model, each on its module as a delta
delta       such a wrapper as an equation, y = tuner(x; layer)
as_built    the model as peft built it, for peft's own functions
allocation  AdaLoRA's regulariser and its allocation of ranks
"""
