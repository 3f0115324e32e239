"""Wrong and right answers for lab 01: slices of the wrong axis, V for Vh, squares and roots, thresholds, the wrong matrix factorised."""

from . import Mutant


def _truncate(expression: str) -> str:
    return f"def truncate(U, S, Vh, r):\n    return {expression}\n"


def _error(expression: str) -> str:
    return f"def relative_error(S, r):\n    return {expression}\n"


_SVD = "U, S, Vh = torch.linalg.svd(W, full_matrices=False)"


def _best(returned: str, svd: str = _SVD) -> str:
    return f"def best_factors(W, r):\n    {svd}\n    return {returned}\n"


def _rank(expression: str) -> str:
    return f"def numerical_rank(W, noise):\n    S = torch.linalg.svdvals(W)\n    m, n = W.shape\n    return {expression}\n"


def _saving(expression: str) -> str:
    return f"def largest_saving_rank(m, n):\n    return {expression}\n"


_FACTORS = (
    "def best_factors(W, r):\n    U, S, Vh = torch.linalg.svd(W, full_matrices=False)\n    return U[:, :r] * S[:r], Vh[:r]\n\n"
)


def _update(expression: str) -> str:
    return _FACTORS + f"def update_factors(original, tuned, r):\n    return {expression}\n"


MUTANTS = {
    "1.1": [
        Mutant("Vh taken for V", _truncate("(U[:, :r] * S[:r]) @ Vh[:, :r].T"), "columns_of_Vh"),
        Mutant("Vh transposed", _truncate("(U[:, :r] * S[:r]) @ Vh[:r].T"), "Vh_transposed"),
        Mutant("Vh not cut", _truncate("(U[:, :r] * S[:r]) @ Vh"), "Vh_whole"),
        Mutant("rows of U", _truncate("(U[:r] * S[:r]) @ Vh[:r]"), "rows_of_U"),
        Mutant("S left out", _truncate("U[:, :r] @ Vh[:r]"), "S_missing"),
        Mutant("S squared", _truncate("(U[:, :r] * S[:r] ** 2) @ Vh[:r]"), "S_twice"),
        Mutant("the root of S", _truncate("(U[:, :r] * S[:r].sqrt()) @ Vh[:r]"), "S_root"),
        Mutant("one term less", _truncate("(U[:, :r - 1] * S[:r - 1]) @ Vh[:r - 1]"), "off_by_one"),
        Mutant("one term more", _truncate("(U[:, :r + 1] * S[:r + 1]) @ Vh[:r + 1]"), "off_by_one"),
        Mutant("only the r-th term", _truncate("S[r - 1] * torch.outer(U[:, r - 1], Vh[r - 1])"), "one_term"),
        Mutant("the smallest", _truncate("(U[:, -r:] * S[-r:]) @ Vh[-r:]"), "smallest"),
        Mutant("what is left out", _truncate("(U[:, r:] * S[r:]) @ Vh[r:]"), "remainder"),
        Mutant("not cut at all", _truncate("(U * S) @ Vh"), "not_truncated"),
        Mutant("transposed", _truncate("((U[:, :r] * S[:r]) @ Vh[:r]).T"), "transposed"),
        Mutant("without Vh", _truncate("U[:, :r] * S[:r]"), "half"),
        Mutant("three parts", _truncate("U[:, :r], S[:r], Vh[:r]"), "parts"),
        Mutant("entry by entry", _truncate("U[:, :r] * S[:r] * Vh[:r]"), "elementwise"),
        Mutant("S as a vector", _truncate("U[:, :r] @ S[:r] @ Vh[:r]"), "S_as_vector"),
        Mutant("S not cut", _truncate("U[:, :r] @ torch.diag(S) @ Vh[:r]"), "S_whole"),
        Mutant("the corner", _truncate("((U * S) @ Vh)[:r, :r]"), "corner"),
        Mutant("begins at the second term", _truncate("sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(1, r + 1))"), "other_terms"),
    ],
    "1.2": [
        Mutant("the energy kept", _error("(S[:r] ** 2).sum() / (S ** 2).sum()"), "energy"),
        Mutant("the norm kept", _error("((S[:r] ** 2).sum() / (S ** 2).sum()) ** 0.5"), "kept"),
        Mutant("no square root", _error("(S[r:] ** 2).sum() / (S ** 2).sum()"), "no_root"),
        Mutant("no squares", _error("S[r:].sum() / S.sum()"), "not_squared"),
        Mutant("a root but no squares", _error("(S[r:].sum() / S.sum()) ** 0.5"), "root_of_sums"),
        Mutant("absolute", _error("S[r:].norm()"), "absolute"),
        Mutant("the spectral norm", _error("S[r] / S[0] if r < len(S) else 0.0"), "spectral"),
        Mutant("relative to S_1", _error("S[r:].norm() / S[0]"), "by_first"),
        Mutant("relative to what is kept", _error("S[r:].norm() / S[:r].norm()"), "by_kept"),
        Mutant("per cent", _error("100 * S[r:].norm() / S.norm()"), "per_cent"),
        Mutant("one minus the norm kept", _error("1 - S[:r].norm() / S.norm()"), "one_minus_kept"),
        Mutant("counts from 1", _error("S[r - 1:].norm() / S.norm()"), "off_by_one_early"),
        Mutant("skips one", _error("S[r + 1:].norm() / S.norm()"), "off_by_one_late"),
        Mutant("one number per term", _error("S[r:] / S.norm()"), "not_summed"),
        Mutant("root of the upper sum alone", _error("(S[r:] ** 2).sum().sqrt() / (S ** 2).sum()"), "root_missing_below"),
        Mutant("the last r", _error("S[-r:].norm() / S.norm()"), "smallest"),
        Mutant("root mean square", _error("(S[r:] ** 2).mean().sqrt() if r < len(S) else 0.0"), "root_mean"),
    ],
    "1.3": [
        Mutant("A, B", _best("Vh[:r], U[:, :r] * S[:r]"), "swapped"),
        Mutant("the product", _best("(U[:, :r] * S[:r]) @ Vh[:r]"), "one_matrix"),
        Mutant("U, S, Vh", _best("U[:, :r], S[:r], Vh[:r]"), "three_factors"),
        Mutant("S left out", _best("U[:, :r], Vh[:r]"), "S_missing"),
        Mutant("S in both", _best("U[:, :r] * S[:r], S[:r, None] * Vh[:r]"), "S_twice"),
        Mutant("the root on one side only", _best("U[:, :r] * S[:r].sqrt(), Vh[:r]"), "S_root"),
        Mutant("not cut", _best("U * S, Vh"), "not_truncated"),
        Mutant("A not turned", _best("U[:, :r] * S[:r], Vh[:r].T"), "transposed"),
        Mutant("torch.svd's V taken for Vh", _best("U[:, :r] * S[:r], V[:r]", "U, S, V = torch.svd(W)"), "columns_of_Vh"),
        Mutant("columns of Vh", _best("U[:, :r] * S[:r], Vh[:, :r].T"), "columns_of_Vh"),
        Mutant("rows of U", _best("U[:r] * S[:r], Vh[:r]"), "rows_of_U"),
        Mutant("S along the wrong side of Vh", _best("U[:, :r], S[:r] * Vh[:r]"), "rows_not_scaled"),
        Mutant("the smallest", _best("U[:, -r:] * S[-r:], Vh[-r:]"), "smallest"),
        Mutant("random A, fitted B", "def best_factors(W, r):\n    A = torch.randn(r, W.shape[1], dtype=W.dtype)\n"
               "    return torch.linalg.lstsq(A.T, W.T).solution.T, A\n", "not_the_best"),
        Mutant("the first r rows as A", "def best_factors(W, r):\n    A = W[:r]\n    return W @ torch.linalg.pinv(A), A\n", "not_the_best"),
        Mutant("Vh along the wrong side of S", _best("U[:, :r], Vh[:r] * S[:r]"), "rows_not_scaled"),
        Mutant("A whole", _best("U[:, :r] * S[:r], Vh"), "one_not_cut"),
        Mutant("always rank 1", _best("U[:, :1] * S[:1], Vh[:1]"), "other_rank"),
        Mutant("full_matrices", _best("(U * S)[:, :r], Vh[:r]", "U, S, Vh = torch.linalg.svd(W)"), "full_matrices"),
    ],
    "1.4": [
        Mutant("matrix_rank", _rank("int(torch.linalg.matrix_rank(W))"), "no_threshold"),
        Mutant("compares with the noise of one entry", _rank("int((S > noise).sum())"), "noise_alone"),
        Mutant("rows alone", _rank("int((S > noise * m ** 0.5).sum())"), "rows_alone"),
        Mutant("columns alone", _rank("int((S > noise * n ** 0.5).sum())"), "columns_alone"),
        Mutant("the longer side", _rank("int((S > noise * max(m, n) ** 0.5).sum())"), "longer_side"),
        Mutant("root of the sum", _rank("int((S > noise * (m + n) ** 0.5).sum())"), "root_of_sum"),
        Mutant("no roots", _rank("int((S > noise * (m + n)).sum())"), "no_roots"),
        Mutant("root of the product", _rank("int((S > noise * (m * n) ** 0.5).sum())"), "root_of_product"),
        Mutant("relative", _rank("int((S > noise * S[0]).sum())"), "relative"),
        Mutant("counts the noise", _rank("int((S <= noise * (m ** 0.5 + n ** 0.5)).sum())"), "below"),
        Mutant("last index above", _rank("int((S > noise * (m ** 0.5 + n ** 0.5)).sum()) - 1"), "one_less"),
        Mutant("adds one to the count", _rank("int((S > noise * (m ** 0.5 + n ** 0.5)).sum()) + 1"), "one_more"),
        Mutant("forgets .sum()", _rank("S > noise * (m ** 0.5 + n ** 0.5)"), "values_not_count"),
        Mutant("brackets forgotten", _rank("int((S > noise * m ** 0.5 + n ** 0.5).sum())"), "noise_on_rows"),
        Mutant("as many columns as singular values", _rank("int((S > noise * (m ** 0.5 + len(S) ** 0.5)).sum())"), "min_for_n"),
        Mutant("relative to the largest", _rank("int((S / S[0] > noise * (m ** 0.5 + n ** 0.5)).sum())"), "relative_edge"),
        Mutant("noise squared", _rank("int((S > noise ** 2 * (m ** 0.5 + n ** 0.5)).sum())"), "noise_squared"),
        Mutant("S squared", _rank("int((S ** 2 > noise * (m ** 0.5 + n ** 0.5)).sum())"), "S_squared"),
    ],
    "1.5": [
        Mutant("not strict", _saving("m * n // (m + n)"), "not_strict"),
        Mutant("a fraction", _saving("m * n / (m + n)"), "fraction"),
        Mutant("rounded", _saving("round(m * n / (m + n))"), "rounded"),
        Mutant("rounded up", _saving("math.ceil(m * n / (m + n))"), "rounded_up"),
        Mutant("one below", _saving("m * n // (m + n) - 1"), "one_below"),
        Mutant("full rank", _saving("min(m, n)"), "full_rank"),
        Mutant("counts S too", _saving("(m * n - 1) // (m + n + 1)"), "counts_S"),
        Mutant("B alone", _saving("(m * n - 1) // m"), "other_factor"),
        Mutant("harmonic mean", _saving("2 * m * n // (m + n)"), "harmonic"),
        Mutant("half the rank", _saving("min(m, n) // 2"), "half_rank"),
        Mutant("brackets forgotten", _saving("int(m * n / m + n)"), "brackets"),
        Mutant("a float", _saving("math.ceil(m * n / (m + n)) - 1.0"), "float"),
        Mutant("at least one", _saving("max(1, (m * n - 1) // (m + n))"), "at_least_one"),
    ],
    "1.6": [
        Mutant("factorises the tuned picture", _update("best_factors(tuned, r)"), "factorises_tuned"),
        Mutant("factorises the original", _update("best_factors(original, r)"), "factorises_original"),
        Mutant("the way back", _update("best_factors(original - tuned, r)"), "sign"),
        Mutant("the sum", _update("best_factors(original + tuned, r)"), "sum"),
        Mutant("A, B", _update("best_factors(tuned - original, r)[::-1]"), "swapped"),
        Mutant("the whole change", _update("tuned - original"), "one_matrix"),
        Mutant("S left out", _update("tuple(torch.linalg.svd(tuned - original, full_matrices=False)[k][s] "
                                     "for k, s in [(0, (slice(None), slice(r))), (2, slice(r))])"), "S_missing"),
        Mutant("random A, fitted B", "def update_factors(original, tuned, r):\n    A = torch.randn(r, tuned.shape[1], dtype=tuned.dtype)\n"
               "    return torch.linalg.lstsq(A.T, (tuned - original).T).solution.T, A\n", "not_the_best"),
        Mutant("cuts first", "def update_factors(original, tuned, r):\n    def cut(W):\n"
               "        U, S, Vh = torch.linalg.svd(W, full_matrices=False)\n        return (U[:, :r] * S[:r]) @ Vh[:r]\n"
               "    U, S, Vh = torch.linalg.svd(cut(tuned) - cut(original), full_matrices=False)\n"
               "    return U[:, :r] * S[:r], Vh[:r]\n", "not_the_best"),
    ],
}  # fmt: skip

ALTERNATIVES = {
    "1.1": [
        "def truncate(U, S, Vh, r):\n    X = torch.zeros(U.shape[0], Vh.shape[1])  # float32\n    for i in range(r):\n"
        "        X += S[i] * torch.outer(U[:, i], Vh[i])\n    return X\n",
        _truncate("U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]"),
        _truncate("sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(r))"),
        _truncate("torch.einsum('mk,k,kn->mn', U[:, :r], S[:r], Vh[:r])"),
        _truncate("(U * torch.where(torch.arange(len(S)) < r, S, 0)) @ Vh"),
    ],
    "1.2": [
        _error("float(torch.linalg.vector_norm(S[r:]) / torch.linalg.vector_norm(S))"),
        _error("max(0.0, 1 - float((S[:r] ** 2).sum() / (S ** 2).sum())) ** 0.5 if r < len(S) else 0.0"),
        _error("math.sqrt(sum(s * s for s in S.tolist()[r:]) / sum(s * s for s in S.tolist()))"),
    ],
    "1.3": [
        _best("U[:, :r], S[:r, None] * Vh[:r]"),
        _best("U[:, :r] * S[:r].sqrt(), torch.diag(S[:r].sqrt()) @ Vh[:r]"),
        _best("-3 * U[:, :r] * S[:r], -Vh[:r] / 3"),
        _best("W @ V[:, :r], V[:, :r].T", "U, S, V = torch.svd(W)"),
        _best("[U[:, :r], U[:, :r].T @ W]", "U, S, Vh = torch.linalg.svd(W)"),
        "def best_factors(W, r):\n    L, Q = torch.linalg.eigh(W.T @ W)\n    return W @ Q[:, -r:], Q[:, -r:].T\n",
    ],
    "1.4": [
        _rank("(S > noise * (math.sqrt(m) + math.sqrt(n))).sum()"),
        _rank("torch.linalg.matrix_rank(W, atol=noise * (m ** 0.5 + n ** 0.5), rtol=0)"),
        _rank("len([s for s in S if s.item() > noise * (m ** 0.5 + n ** 0.5)])"),
    ],
    "1.5": [
        _saving("math.ceil(m * n / (m + n)) - 1"),
        _saving("max(r for r in range(min(m, n) + 1) if r * (m + n) < m * n)"),
        "def largest_saving_rank(m, n):\n    r = 0\n    while (r + 1) * (m + n) < m * n:\n        r += 1\n    return r\n",
    ],
    "1.6": [
        _update("best_factors(tuned - original, r)"),
        _update("[-part if k == 0 else part for k, part in enumerate(best_factors(original - tuned, r))]"),
        "def update_factors(original, tuned, r):\n    U, S, Vh = torch.linalg.svd(tuned - original)\n"
        "    return U[:, :r], S[:r, None] * Vh[:r]\n",
    ],
}
