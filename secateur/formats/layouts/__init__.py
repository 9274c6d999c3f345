"""How one weight lies on disk: a codec a layout, and where weights are codes, the family that they are of.

Each layout is a file of this folder, or of `composite_layouts`, and registers itself under the name that a checkpoint's config
gives; those of other packages are modules that the entry points of `layout.GROUP` name.
"""
