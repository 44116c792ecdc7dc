"""One file a method, named as in its paper: the equation (a Delta) and the recipe (a Method)."""
