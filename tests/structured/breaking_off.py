"""A run that ends in the middle, and goes on."""

import pytest

import secateur
from secateur.pipeline.recorder import Recorder


def compress_in_two_runs(model, out, recipe, monkeypatch):
    """Compress a model, interrupted behind its second block, and resumed."""
    end_block = Recorder.end_block

    def stop(self, number, outputs=()):
        end_block(self, number, outputs)
        if number == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "end_block", stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.compress(model, out, recipe)
    monkeypatch.undo()
    secateur.compress(model, out, recipe, resume=True)
