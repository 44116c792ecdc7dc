"""One file a method, named as its paper names it: the equation (a Delta) and the recipe (a Method)."""
