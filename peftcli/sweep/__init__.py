"""Many runs from one line: planned, divided among processes and machines, and kept account of."""
