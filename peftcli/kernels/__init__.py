"""Operations of the adapter math: one file each, with the plain reference beside the fast path."""
