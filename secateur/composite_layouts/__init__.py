"""Layouts that are made of other layouts: a file each, which registers itself as those in `formats/layouts` do."""
