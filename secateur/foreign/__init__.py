"""What others write: each format is a file of this folder and registers itself under what configs call it.

Those of other packages are modules that the entry points of `format.GROUP` name.
"""
