"""Triton kernels: one file an operation, under the operation's name. None is imported before an
operation runs on CUDA.

Products accumulate in float32. Sums over tokens are made in parts whose order is fixed, so that a
run repeats bit for bit. `UPCAST` makes the operands float32 before a product: Triton's interpreter
is wrong in bfloat16 otherwise.
"""
