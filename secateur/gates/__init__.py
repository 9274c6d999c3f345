"""Activation sparsity: which inputs of a linear are read for a token, and with them which weights.

Each method is a file of this folder and registers itself under the name that the user types; `section` is what a checkpoint
says of it, and `running` what stands before linears while a model runs, which needs no method.
"""
