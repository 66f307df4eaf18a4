"""Hadamard matrices of every order that a diffusion transformer's width needs, built rather than stored.

A Hadamard matrix H of order n has entries +1 and -1 and H H^T = n I. `rotation.py` turns them into rotations.
"""

from __future__ import annotations

import functools
import math

import torch


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime and k <= 3; None for anything else."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p**k == q and p > 2 and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, k
    return None


def _digits(value: int, p: int, k: int) -> list[int]:
    return [value // p**i % p for i in range(k)]


def _reduction(p: int, k: int) -> list[int]:
    """Coefficients r with x^k = sum r_i x^i, where x^k - r(x) is irreducible over GF(p).

    A polynomial of degree 2 or 3 is irreducible exactly when it has no root.
    """
    for candidate in range(p**k):
        r = _digits(candidate, p, k)
        if all((pow(x, k, p) - sum(c * pow(x, i, p) for i, c in enumerate(r))) % p for x in range(p)):
            return r
    raise AssertionError(f"no irreducible polynomial of degree {k} over GF({p})")  # a theorem says that there is one


def _squares(p: int, k: int) -> set[int]:
    """The non-zero squares of GF(p^k), an element being the number whose base-p digits are its coefficients."""
    if k == 1:
        return {x * x % p for x in range(1, p)}
    reduction = _reduction(p, k)
    squares = set()
    for value in range(1, p**k):
        a = _digits(value, p, k)
        product = [0] * (2 * k - 1)
        for i in range(k):
            for j in range(k):
                product[i + j] += a[i] * a[j]
        for degree in range(2 * k - 2, k - 1, -1):
            for i in range(k):
                product[degree - k + i] += product[degree] * reduction[i]
        squares.add(sum(c % p * p**i for i, c in enumerate(product[:k])))
    return squares


def _jacobsthal(q: int) -> torch.Tensor:
    """Q [q, q] with Q_ab = chi(a - b), chi the quadratic character of GF(q): 0, +1 on squares, -1 elsewhere."""
    field = _prime_power(q)
    if field is None:
        raise ValueError(f"{q} is not an odd prime, its square or its cube")
    p, k = field
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[list(_squares(p, k))] = 1.0
    chi[0] = 0.0
    elements = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for i in range(k):
        digit = elements // p**i % p
        difference += (digit[:, None] - digit[None, :]) % p * p**i
    return chi[difference]


def _paley(n: int) -> torch.Tensor:
    """Paley's two constructions (R. Paley, On orthogonal matrices, 1933).

    I:  q = n - 1   = 3 mod 4: H = I + S,                             S = [[0, 1], [-1, Q]]
    II: q = n/2 - 1 = 1 mod 4: H = S x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]],  S = [[0, 1], [1, Q]]
    """
    first = _is_paley_one(n)
    q = n - 1 if first else n // 2 - 1
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:] = 1.0
    s[1:, 0] = -1.0 if first else 1.0
    s[1:, 1:] = _jacobsthal(q)
    identity = torch.eye(q + 1, dtype=torch.float64)
    if first:
        return identity + s
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(s, plus) + torch.kron(identity, minus)


def _is_paley_one(n: int) -> bool:
    return n % 4 == 0 and _prime_power(n - 1) is not None


def _is_paley_two(n: int) -> bool:
    return n % 4 == 0 and n // 2 % 4 == 2 and _prime_power(n // 2 - 1) is not None


@functools.lru_cache(maxsize=4096)
def _kronecker_orders(n: int) -> tuple[int, ...] | None:
    """Orders with product n, each 2 or a Paley order, the largest as small as can be; None when there are none."""
    if n < 1:
        return None
    if n == 1:
        return ()
    if n & (n - 1) == 0:
        return (2,) * (n.bit_length() - 1)  # Sylvester
    choices: list[tuple[int, ...]] = [(n,)] if _is_paley_one(n) or _is_paley_two(n) else []
    for a in range(2, math.isqrt(n) + 1):
        if n % a == 0:
            left, right = _kronecker_orders(a), _kronecker_orders(n // a)
            if left is not None and right is not None:
                choices.append(tuple(sorted(left + right)))
    return min(choices, key=lambda orders: (max(orders), len(orders), orders), default=None)


def is_hadamard_order(n: int) -> bool:
    """Whether `hadamard(n)` can build the matrix."""
    return _kronecker_orders(n) is not None


@functools.lru_cache(maxsize=64)
def _hadamard(n: int) -> torch.Tensor:
    orders = _kronecker_orders(n)
    if orders is None:
        raise ValueError(
            f"no Hadamard matrix of order {n} can be built here: it is not a product of 2s and Paley orders "
            "(q + 1 or 2(q + 1) for an odd prime q, its square or its cube)"
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    sylvester = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for order in orders:
        matrix = torch.kron(matrix, sylvester if order == 2 else _paley(order))
    return matrix


def hadamard(n: int) -> torch.Tensor:
    """A Hadamard matrix: float64 [n, n] with entries +1 and -1 and H H^T = n I.

    Kronecker products of Sylvester's matrix and the two constructions of Paley, with the smallest Paley core.

    Raises:
        ValueError: when no such matrix can be built for n (`is_hadamard_order` tells beforehand).
    """
    return _hadamard(n).clone()


@functools.lru_cache(maxsize=256)
def two_factors(n: int) -> tuple[int, int]:
    """(a, b), a <= b, both Hadamard orders with a b = n and the least a + b.

    H_a x H_b applied factor by factor costs n (a + b) multiply-adds a row instead of n^2.

    Raises:
        ValueError: when n has no such factors.
    """
    for a in range(math.isqrt(max(n, 0)), 0, -1):  # nearest to the square root is the least sum
        if n % a == 0 and is_hadamard_order(a) and is_hadamard_order(n // a):
            return a, n // a
    raise ValueError(f"{n} is not the product of two Hadamard orders")


def is_regular_order(n: int) -> bool:
    """Whether `regular_hadamard(n)` can build the matrix: 4^i 36^j."""
    while n > 0 and n % 36 == 0:
        n //= 36
    return n > 0 and n & (n - 1) == 0 and n.bit_length() % 2 == 1


def regular_hadamard(n: int) -> torch.Tensor:
    """A regular Hadamard matrix: float64 [n, n], entries +1 and -1, H H^T = n I, every row and column sums to sqrt(n).

    Kronecker products of order 4, J - 2 I, and of order 36 from a difference set of Z_6 x Z_6: the elements other than 0 of
    three subgroups of order 6 that meet only in 0 (J. F. Dillon, Elementary Hadamard difference sets, 1974).

    Raises:
        ValueError: when n is no product of 4s and 36s (`is_regular_order` tells beforehand).
    """
    if not is_regular_order(n):
        raise ValueError(
            f"no regular Hadamard matrix of order {n} can be built here: it is not a product of 4s and 36s"
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        factor = _regular_36() if n // matrix.shape[0] % 36 == 0 else 1 - 2 * torch.eye(4, dtype=torch.float64)
        matrix = torch.kron(matrix, factor)
    return matrix


def _regular_36() -> torch.Tensor:
    elements = [(a, b) for a in range(6) for b in range(6)]
    chosen = {element for k in range(1, 6) for element in ((k, 0), (0, k), (k, k))}
    rows = [[-1.0 if ((c - a) % 6, (d - b) % 6) in chosen else 1.0 for c, d in elements] for a, b in elements]
    return torch.tensor(rows, dtype=torch.float64)
