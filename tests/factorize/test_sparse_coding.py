"""Sparse coding and K-SVD, against scikit-learn, against all supports there are, and by what has to hold of any.

N: signals, M: numbers of a signal, K: atoms.
"""

import itertools

import pytest
import torch

from secateur.solvers.dictionary_learning import k_svd
from secateur.solvers.sparse_coding import pursue, pursue_in_rounds

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def square(X_NM, D_KM, coefficient_NK):
    return (X_NM - coefficient_NK @ D_KM).square().sum(1)


def exhaustive(X_NM, D_KM, most):
    """The least squared error of each signal over all sets of so many atoms."""
    errors = []
    for support in itertools.combinations(range(len(D_KM)), most):
        some = D_KM[list(support)]
        fit = torch.linalg.lstsq(some.T, X_NM.T).solution
        errors.append((X_NM - fit.T @ some).square().sum(1))
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 40])
def test_pursuit_is_that_of_scikit_learn(most):
    linear_model = pytest.importorskip("sklearn.linear_model")
    D_KM = torch.nn.functional.normalize(draw(30, 50), dim=1)
    X_NM = draw(9, 50, seed=1)
    most = min(most, 30)
    theirs = linear_model.orthogonal_mp_gram(
        (D_KM @ D_KM.T).numpy(), (D_KM @ X_NM.T).numpy(), n_nonzero_coefs=most, copy_Gram=True, copy_Xy=True
    )
    torch.testing.assert_close(pursue(X_NM, D_KM, most), torch.from_numpy(theirs.T.copy()))


@pytest.mark.parametrize("code", [pursue, lambda X, D, most: pursue_in_rounds(X, D, most, most)])
def test_orthonormal_atoms_and_single_ones_are_chosen_as_by_trying_all(code):
    X_NM = draw(12, 7, seed=2)
    basis, _ = torch.linalg.qr(draw(7, 7))
    for most in (1, 2, 3):
        found = code(X_NM, basis, most)
        assert (found != 0).sum(1).max() == most
        torch.testing.assert_close(square(X_NM, basis, found), exhaustive(X_NM, basis, most))
    D_KM = draw(9, 7, seed=3)  # of any length
    torch.testing.assert_close(square(X_NM, D_KM, code(X_NM, D_KM, 1)), exhaustive(X_NM, D_KM, 1))


@pytest.mark.parametrize("rounds", [0, 1, 2, 4])
def test_coefficients_are_the_best_of_their_support(rounds):
    X_NM, D_KM = draw(20, 12), draw(16, 12, seed=1) * torch.logspace(-2, 2, 16, dtype=F64)[:, None]
    found = pursue(X_NM, D_KM, 4) if rounds == 0 else pursue_in_rounds(X_NM, D_KM, 4, rounds)
    error = square(X_NM, D_KM, found)
    assert (error >= exhaustive(X_NM, D_KM, 4) - 1e-9).all()
    for n, row in enumerate(found):
        some = D_KM[row != 0]
        assert len(some) == 4
        fit = torch.linalg.lstsq(some.T, X_NM[n]).solution
        torch.testing.assert_close(error[n], (X_NM[n] - fit @ some).square().sum(), rtol=1e-6, atol=1e-9)


def test_choosing_in_rounds_comes_near_one_at_a_time():
    X_NM = draw(60, 40) @ torch.diag(torch.arange(1, 41, dtype=F64) ** -0.5)
    D_KM = k_svd(X_NM, 24, lambda X, D: pursue(X, D, 10), 2, 2)
    one, many = pursue(X_NM, D_KM, 10), pursue_in_rounds(X_NM, D_KM, 10, 5)
    assert square(X_NM, D_KM, many).sum() < 1.1 * square(X_NM, D_KM, one).sum()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rounds", [0, 3])
def test_nasty_dictionaries(rounds, dtype):
    """Atoms that are zero, twins and sums of others; signals that are zero, or one atom."""
    D_KM = draw(6, 5).to(dtype)
    D_KM[1] = 0
    D_KM[3] = D_KM[2]
    D_KM[4] = D_KM[0] + D_KM[2]
    X_NM = torch.stack([torch.zeros(5, dtype=dtype), 2 * D_KM[5], D_KM[0] - D_KM[2], draw(5, seed=4).to(dtype)])

    def code(most):
        return pursue(X_NM, D_KM, most) if rounds == 0 else pursue_in_rounds(X_NM, D_KM, most, rounds)

    found = code(6)
    assert torch.isfinite(found).all()
    assert not found[:, 1].any()
    assert not found[0].any()
    torch.testing.assert_close((found @ D_KM)[1:3], X_NM[1:3], rtol=1e-4, atol=1e-4)
    span = D_KM[[0, 2, 5]]
    least = X_NM[3] - torch.linalg.lstsq(span.T, X_NM[3]).solution @ span
    torch.testing.assert_close(X_NM[3] - found[3] @ D_KM, least, rtol=1e-3, atol=1e-3)
    assert not code(1)[0].any()
    assert not pursue(X_NM, torch.zeros(2, 5, dtype=dtype), 2).any()
    assert not pursue_in_rounds(X_NM, torch.zeros(2, 5, dtype=dtype), 2, 2).any()


def test_a_dictionary_that_was_hidden_is_found_again():
    D_KM = torch.nn.functional.normalize(draw(8, 10), dim=1)
    generator = torch.Generator().manual_seed(5)
    S_NK = torch.zeros(400, 8, dtype=F64)
    for row in S_NK:
        row[torch.randperm(8, generator=generator)[:2]] = torch.randn(2, generator=generator, dtype=F64)
    X_NM = S_NK @ D_KM
    found = k_svd(X_NM, 8, lambda X, D: pursue(X, D, 2), 40, 3)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8, dtype=F64))
    # Each hidden atom but for one at most, which may be a mixture.
    assert ((D_KM @ found.T).abs().amax(1) > 0.999).sum() >= 7


def test_an_iteration_makes_no_error_larger_that_it_has_coded():
    X_NM = draw(50, 20) @ torch.diag(torch.arange(1, 21, dtype=F64) ** -0.7)

    def error(iterations):
        D_KM = k_svd(X_NM, 12, lambda X, D: pursue(X, D, 4), iterations, 5)
        return square(X_NM, D_KM, pursue(X_NM, D_KM, 4)).sum()

    errors = [error(n) for n in (0, 1, 4)]
    assert errors[2] < errors[1] < errors[0]


def test_one_atom_is_the_leading_direction():
    X_NM = draw(30, 6) + 2
    [d_M] = k_svd(X_NM, 1, lambda X, D: pursue(X, D, 1), 3, 3)
    _, _, V = torch.linalg.svd(X_NM)
    torch.testing.assert_close((d_M @ V[0]).abs(), torch.ones((), dtype=F64))


def test_more_atoms_than_numbers_and_unused_ones():
    X_NM = draw(5, 3)
    assert k_svd(X_NM, 4, lambda X, D: pursue(X, D, 1), 6, 3).shape == (4, 3)
    D_KM = k_svd(X_NM, 5, lambda X, D: pursue(X, D, 1), 6, 3)
    # As many atoms as signals, of which each uses one: all are met.
    assert square(X_NM, D_KM, pursue(X_NM, D_KM, 1)).sum() < 1e-20
    assert torch.isfinite(k_svd(torch.zeros(4, 3, dtype=F64), 2, lambda X, D: pursue(X, D, 1), 2, 2)).all()
