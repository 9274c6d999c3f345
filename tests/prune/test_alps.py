"""ALPS and the best weights for a mask, against slow float64 versions, and what they must do with awkward inputs.

T: tokens, O: output features, I: input features, K: inputs kept of a row, N: weights of a linear.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from methods import alps, prune, reconstruct, sparsegpt, stack, wanda
from test_sparsegpt import assert_well_formed, draw, draw_indefinite, gather

import secateur
import secateur.prune.alps as module
import secateur.solvers.conjugate_gradients as reconstruct_module
from secateur.core.patterns import NM, Unstructured
from secateur.core.stats import InputStats, Level
from secateur.prune.alps import eigen
from secateur.solvers.conjugate_gradients import conjugate_gradients


def damped(x_TI):
    """The Gram matrix in float64 with the ridge that ALPS adds."""
    G_II = x_TI.double().T @ x_TI.double()
    mean = G_II.diagonal().mean()
    G_II.diagonal()[G_II.diagonal() == 0] = mean
    return G_II + 0.01 * mean * torch.eye(len(G_II))


def error(W_OI, new_OI, G_II):
    change_OI = new_OI.double() - W_OI.double()
    return ((change_OI @ G_II) * change_OI).sum().item()


def least_squares(W_OI, keep_OI, G_II):
    """For each row the normal equations on its kept inputs."""
    best_OI = torch.zeros(W_OI.shape, dtype=torch.float64)
    for o, keep_I in enumerate(keep_OI):
        if keep_I.any():
            best_OI[o, keep_I] = torch.linalg.solve(G_II[keep_I][:, keep_I], G_II[keep_I] @ W_OI[o].double())
    return best_OI


def slow_alps(W_OI, x_TI, pattern):
    """Algorithm 1 of arXiv:2406.07831 in float64 with its multiplier V, then least squares on the mask that it ends with.

    B ← (H + ρ)⁻¹(HŴ − V + ρD); then D ← the largest of B + V/ρ; then V ← V + ρ(B − D). B is over-relaxed against the last D.
    """
    G_II = damped(x_TI)
    scale_I = G_II.diagonal().sqrt()
    H_II = G_II / scale_I / scale_I[:, None]
    W_IO = (W_OI.double() * scale_I).T
    I = len(H_II)

    def project(Z_IO):
        size_OI = Z_IO.T.abs()
        if isinstance(pattern, NM):
            size_GM = size_OI.reshape(-1, pattern.m)
            keep_GM = torch.zeros_like(size_GM, dtype=torch.bool)
            return keep_GM.scatter_(1, size_GM.topk(pattern.n, dim=1).indices, True).view_as(size_OI).T
        keep_N = torch.zeros(size_OI.numel(), dtype=torch.bool)
        keep_N[size_OI.flatten().topk(len(keep_N) - pattern.pruned(len(keep_N))).indices] = True
        return keep_N.view_as(size_OI).T

    keep_IO = project(W_IO)
    D_IO, V_IO = W_IO * keep_IO, torch.zeros_like(W_IO)
    for stage in range(module._STAGES):
        rho = 0.1 * (0.8 / 0.1) ** (stage / (module._STAGES - 1))
        for _ in range(module._ITERATIONS):
            B_IO = torch.linalg.solve(H_II + rho * torch.eye(I), H_II @ W_IO - V_IO + rho * D_IO)
            B_IO = module._RELAXATION * B_IO + (1 - module._RELAXATION) * D_IO
            Z_IO = B_IO + V_IO / rho
            keep_IO = project(Z_IO)
            D_IO = Z_IO * keep_IO
            V_IO = V_IO + rho * (B_IO - D_IO)
    keep_OI = keep_IO.T
    return least_squares(W_OI, keep_OI, G_II), keep_OI


def assert_sound(pruned, pattern, sizes):
    """What holds of every result, however nasty the input."""
    assert_well_formed(pruned)
    if isinstance(pattern, NM):
        assert (pruned.keep_OI.view(len(pruned.keep_OI), -1, pattern.m).sum(2) == pattern.n).all()
        return
    for keep_RI in pruned.keep_OI.split(sizes):
        assert (~keep_RI).sum() == pattern.pruned(keep_RI.numel())


CASES = [
    (8, 48, Unstructured(0.5)),
    (5, 37, Unstructured(0.7)),
    (1, 45, Unstructured(0.6)),
    (7, 203, Unstructured(0.3)),
    (8, 48, NM(2, 4)),
    (6, 140, NM(1, 4)),
    (4, 132, NM(2, 3)),
]


@pytest.mark.parametrize(("outputs", "inputs", "pattern"), CASES, ids=str)
def test_agrees_with_the_float64_twin(outputs, inputs, pattern):
    W_OI, x_TI = draw(outputs, inputs)
    pruned = alps(W_OI, gather(x_TI), pattern)
    slow_OI, keep_OI = slow_alps(W_OI, x_TI, pattern)
    assert_sound(pruned, pattern, [outputs])
    # Rounding may settle a near tie otherwise, here and there.
    assert (pruned.keep_OI == keep_OI).float().mean() > 0.99
    G_II = damped(x_TI)
    assert error(W_OI, pruned.W_OI, G_II) == pytest.approx(error(W_OI, slow_OI, G_II), rel=2e-3)


def test_is_near_the_best_of_all_masks():
    ratios = []
    for seed in range(60):
        W_1I, x_TI = draw(1, 6, tokens=30, seed=seed)
        G_II = damped(x_TI)
        masks = [torch.tensor([[i in kept for i in range(6)]]) for kept in itertools.combinations(range(6), 3)]
        best = min(error(W_1I, least_squares(W_1I, keep_1I, G_II), G_II) for keep_1I in masks)
        found = error(W_1I, alps(W_1I, gather(x_TI), Unstructured(0.5)).W_OI, G_II)
        assert found >= best * (1 - 1e-5)
        ratios.append(found / best)
    assert sum(ratio < 1.001 for ratio in ratios) >= 40
    assert sorted(ratios)[len(ratios) // 2] < 1.001


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_leaves_less_error_than_sparsegpt(pattern, seed):
    W_OI, x_TI = draw(24, 96, seed=seed)
    G_II = damped(x_TI)
    ours, theirs = alps(W_OI, gather(x_TI), pattern), sparsegpt(W_OI, gather(x_TI), pattern)
    assert error(W_OI, ours.W_OI, G_II) < 0.95 * error(W_OI, theirs.W_OI, G_II)


def test_ranks_weights_within_each_stacked_linear():
    W_OI, x_TI = draw(12, 40)
    W_OI[:4] *= 100
    pruned = alps(W_OI, gather(x_TI), Unstructured(0.5), [4, 8])
    assert_sound(pruned, Unstructured(0.5), [4, 8])
    alone = alps(W_OI[4:], gather(x_TI), Unstructured(0.5))
    assert torch.equal(pruned.keep_OI[4:], alone.keep_OI)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize(
    "kind", ["dead", "all dead", "twins", "few tokens", "one row", "bfloat16", "zero weights", "large"]
)
def test_nasty_input(kind, pattern):
    W_OI, x_TI = draw(1 if kind == "one row" else 6, 40, tokens=3 if kind == "few tokens" else None)
    if kind == "dead":
        x_TI[:, ::3] = 0
    elif kind == "all dead":
        x_TI[:] = 0
    elif kind == "twins":
        x_TI[:, 20:] = x_TI[:, :20]
    elif kind == "bfloat16":
        W_OI, x_TI = W_OI.bfloat16(), x_TI.bfloat16()
    elif kind == "zero weights":
        W_OI[:] = 0
    elif kind == "large":
        W_OI, x_TI = W_OI * 1e6, x_TI * 1e4
    before_OI = W_OI.clone()
    pruned = alps(W_OI, gather(x_TI), pattern)
    assert_sound(pruned, pattern, [len(W_OI)])
    assert torch.equal(W_OI, before_OI)
    if kind == "dead":
        assert (pruned.W_OI[:, ::3] == 0).all()
        assert "14 of 40 inputs are always zero" in pruned.notes[0]
    if kind == "few tokens":
        assert any("3 calibration tokens are fewer than the 40 inputs" in note for note in pruned.notes)


def test_statistics_that_are_not_finite_or_too_few_are_refused():
    W_OI, x_TI = draw(6, 40)
    x_TI[3, 5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        alps(W_OI, gather(x_TI), Unstructured(0.5))
    with pytest.raises(ValueError, match="Gram matrix was not gathered"):
        alps(W_OI, InputStats.empty(40, Level.MOMENTS), Unstructured(0.5))
    with pytest.raises(ValueError, match="do not divide"):
        alps(W_OI, gather(x_TI), NM(2, 3))


@pytest.mark.parametrize(("outputs", "inputs", "sparsity"), [(8, 48, 0.5), (3, 37, 0.8), (1, 30, 0.4), (20, 160, 0.9)])
def test_reconstruction_is_least_squares_on_the_mask(outputs, inputs, sparsity):
    W_OI, x_TI = draw(outputs, inputs)
    stats = gather(x_TI)
    keep_OI = wanda(W_OI, stats, Unstructured(sparsity)).keep_OI
    found_OI, notes = reconstruct(W_OI, keep_OI, stats)
    G_II = damped(x_TI)
    slow_OI = least_squares(W_OI, keep_OI, G_II)
    assert notes == ()
    assert (found_OI[~keep_OI] == 0).all()
    gained = error(W_OI, W_OI * keep_OI, G_II) - error(W_OI, slow_OI, G_II)
    assert error(W_OI, found_OI, G_II) - error(W_OI, slow_OI, G_II) < 1e-3 * gained


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("start", ["dense", "nothing"])
def test_each_row_comes_as_near_to_least_squares_as_it_is_told(tolerance, start):
    W_OI, x_TI = draw(40, 96)
    keep_OI = wanda(W_OI, gather(x_TI), Unstructured(0.6)).keep_OI
    G_II = damped(x_TI)
    start_OI = W_OI * keep_OI if start == "dense" else torch.zeros_like(W_OI)
    found_OI = conjugate_gradients(G_II.float(), G_II.inverse().float(), W_OI, keep_OI, start_OI, tolerance, 60)
    slow_OI = least_squares(W_OI, keep_OI, G_II)
    ratios = [
        error(W_OI[o : o + 1], found_OI[o : o + 1], G_II) / error(W_OI[o : o + 1], slow_OI[o : o + 1], G_II)
        for o in range(40)
    ]
    assert max(ratios) < 1 + tolerance + 1e-6
    if tolerance == 1e-1:
        assert max(ratios) > 1.0001, "nothing was left out that could be"


def test_rows_that_run_out_of_steps_are_better_than_before_and_those_that_rounding_spoils_stay():
    W_OI, x_TI = draw(10, 64)
    keep_OI = wanda(W_OI, gather(x_TI), Unstructured(0.5)).keep_OI
    G_II, start_OI = damped(x_TI), W_OI * keep_OI
    before, errors = error(W_OI, start_OI, G_II), []
    for steps in range(4):
        found_OI = conjugate_gradients(G_II.float(), G_II.inverse().float(), W_OI, keep_OI, start_OI, 0, steps)
        errors.append(error(W_OI, found_OI, G_II))
    assert errors[0] == before
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0]
    spoilt_II = torch.full((64, 64), torch.nan)
    assert torch.equal(conjugate_gradients(G_II.float(), spoilt_II, W_OI, keep_OI, start_OI), start_OI)


@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_how_many_rows_are_computed_on_at_a_time_does_not_matter(pattern, monkeypatch):
    W_OI, x_TI = draw(23, 64)
    whole = alps(W_OI, gather(x_TI), pattern, [10, 13])
    monkeypatch.setattr(reconstruct_module, "_PIECE", 64 * 5)
    monkeypatch.setattr(reconstruct_module, "_LEAST_ROWS", 1)
    pieces = alps(W_OI, gather(x_TI), pattern, [10, 13])
    assert (pieces.keep_OI == whole.keep_OI).float().mean() > 0.99
    G_II = damped(x_TI)
    assert error(W_OI, pieces.W_OI, G_II) == pytest.approx(error(W_OI, whole.W_OI, G_II), rel=1e-3)


@pytest.mark.parametrize("inputs", [1, 5, 300])
def test_the_eigenvectors_give_the_scaled_gram_matrix_and_its_inverse(inputs):
    _, x_TI = draw(1, inputs)
    x_TI[:, inputs // 2] *= inputs > 1
    stats = gather(x_TI)
    found = eigen(stack(torch.zeros(1, stats.features), stats), 0.01)
    G_II = stack(torch.zeros(1, stats.features), stats).damped_gram(0.01).double()
    H_II = G_II / G_II.diagonal().sqrt() / G_II.diagonal().sqrt()[:, None]
    torch.testing.assert_close(found.product(found.values_I).double(), H_II, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.product(1 / found.values_I).double() @ H_II, torch.eye(inputs).double(), rtol=0, atol=2e-3
    )
    assert found.damping == 0.01


def test_a_gram_matrix_that_needs_more_damping():
    """One that rounding has left with a clearly negative eigenvalue: the note names the damping that was used."""
    W_OI, stats = draw_indefinite()
    pruned = alps(W_OI, stats, Unstructured(0.5))
    assert_sound(pruned, Unstructured(0.5), [4])
    assert [note for note in pruned.notes if "damping raised from 0.01 to 0.1 " in note]


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=str)
def test_reconstruction_makes_no_row_of_any_pruner_worse(name, pattern):
    W_OI, x_TI = draw(10, 64)
    x_TI[:, :3] = 0
    stats = gather(x_TI)
    pruned = prune(name, W_OI, stats, pattern, [4, 6])
    found_OI, _ = reconstruct(W_OI, pruned.keep_OI, stats, pruned.W_OI)
    live_OI = W_OI.clone()
    live_OI[:, :3] = 0
    G_II = damped(x_TI)
    for o in range(10):
        before = error(live_OI[o : o + 1], pruned.W_OI[o : o + 1] * (torch.arange(64) > 2), G_II)
        assert error(live_OI[o : o + 1], found_OI[o : o + 1], G_II) <= before * (1 + 1e-5)


def test_what_several_solves_share_is_found_once_and_forgotten_with_more_data():
    _, x_TI = draw(2, 8)
    stats = gather(x_TI)
    calls = []
    for _ in range(2):
        assert stats.once("key", lambda: calls.append(1) or 7) == 7
    assert len(calls) == 1
    stats.add(x_TI)
    stats.once("key", lambda: calls.append(1))
    assert len(calls) == 2


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.4, "refine": "dsnot"}], ids=str
)
def test_a_run_with_reconstruction_leaves_less_error_with_the_same_mask(options, model_of, text_file, tmp_path):
    calibration = secateur.Calibration(str(text_file), samples=4, seq_len=64)
    model = model_of("llama")
    recipe = secateur.Recipe("wanda", **options, targets=("*.0.*",), calibration=calibration)
    secateur.compress(str(model), tmp_path / "plain", recipe)
    better = secateur.compress(str(model), tmp_path / "better", replace(recipe, reconstruct=True))
    # Inputs of the first group are those of the dense model in both.
    plain, found = (secateur.load(tmp_path / out).model.layers[0].self_attn for out in ("plain", "better"))
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(plain.get_submodule(name).weight != 0, found.get_submodule(name).weight != 0)
    assert [linear.error_kind for linear in better.linears] == ["output"] * len(better.linears)
    again = secateur.compress(
        str(model), tmp_path / "again", secateur.Recipe.read(tmp_path / "better" / "secateur.json")
    )
    assert again.recipe["reconstruct"] is True
    assert weight_files(tmp_path / "again") == weight_files(tmp_path / "better")


def weight_files(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
