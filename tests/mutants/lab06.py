"""Wrong and right answers for lab 06: dense products, lost Q's, squares and roots, min and max, rows and columns, the wrong norm, the wrong matrix."""

from . import Mutant


def _svd(body: str) -> str:
    return "def factored_svd(B, A, scaling):\n" + "".join(f"    {line}\n" for line in body.split("\n"))


_QR = "Q_B, R_B = torch.linalg.qr(B)\nQ_A, R_A = torch.linalg.qr(A.T)\n"
_SMALL = _QR + "U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T)\n"


def _rank(expression: str, p: str = "S / S.sum()") -> str:
    return f"def effective_rank(S):\n    S = S[S > 0]\n    p = {p}\n    return {expression}\n"


def _phi(expression: str) -> str:
    return f"def phi(first, second, i, j):\n    C = first[:i] @ second[:j].T\n    return {expression}\n"


def _chance(expression: str) -> str:
    return f"def phi_by_chance(i, j, d):\n    return {expression}\n"


def _amplification(returned: str, overlap: str = "(U[:, :r].T @ W @ Vh[:r].T).norm()", chance: str = "r * W.norm() / W.numel() ** 0.5") -> str:
    return (
        f"def amplification(W, U, S, Vh, r):\n    overlap = {overlap}\n    chance = {chance}\n    norm = S.norm()\n    return {returned}\n"
    )


_BOTH = "norm / overlap, norm / chance"
_TWO = "U0, S0, V0 = torch.linalg.svd(W0, full_matrices=False)\n    U1, S1, V1 = torch.linalg.svd(W1, full_matrices=False)\n"


def _nearest(expression: str, before: str = _TWO) -> str:
    return f"def nearest_old(W0, W1, k):\n    {before}    return {expression}\n"


MUTANTS = {
    "6.1": [
        Mutant("a dense SVD, cut", _svd(
            "U, S, Vh = torch.linalg.svd(scaling * B @ A, full_matrices=False)\nr = B.shape[1]\nreturn U[:, :r], S[:r], Vh[:r]"), "dense"),
        Mutant("a dense SVD, whole", _svd("return torch.linalg.svd(scaling * B @ A, full_matrices=False)"), "too_many"),
        Mutant("dense, by the Gram matrix of ΔW", _svd(
            "W = scaling * B @ A\nr = B.shape[1]\nU, S, V = torch.svd_lowrank(W, q=r, niter=8)\nreturn U, S, V.T"), "dense"),
        Mutant("one QR, then dense", _svd("Q, R = torch.linalg.qr(B)\nU, S, Vh = torch.linalg.svd(scaling * Q @ R @ A, full_matrices=False)\n"
                                          "return U[:, :len(R)], S[:len(R)], Vh[:len(R)]"), "dense"),
        Mutant("complete QR", _svd('Q_B, R_B = torch.linalg.qr(B, mode="complete")\nQ_A, R_A = torch.linalg.qr(A.T, mode="complete")\n'
                                   "U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T, full_matrices=False)\nreturn Q_B @ U, S, Vh @ Q_A.T"), "too_many"),
        Mutant("no scaling", _svd(_QR + "U, S, Vh = torch.linalg.svd(R_B @ R_A.T)\nreturn Q_B @ U, S, Vh @ Q_A.T"), "scaling_missing"),
        Mutant("scaling twice", _svd(_SMALL + "return Q_B @ U, scaling * S, Vh @ Q_A.T"), "scaling_twice"),
        Mutant("scaling times S", _svd(_QR + "U, S, Vh = torch.linalg.svd(R_B @ R_A.T)\nreturn Q_B @ U, scaling * S, Vh @ Q_A.T"), "negative_S"),
        Mutant("absolute scaling", _svd(_QR + "U, S, Vh = torch.linalg.svd(R_B @ R_A.T)\nreturn Q_B @ U, abs(scaling) * S, Vh @ Q_A.T"), "sign_lost"),
        Mutant("without the Q's", _svd(_SMALL + "return U, S, Vh"), "not_turned_back"),
        Mutant("one Q forgotten", _svd(_SMALL + "return Q_B @ U, S, Vh"), "not_turned_back"),
        Mutant("R_A not transposed", _svd(_QR + "U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A)\nreturn Q_B @ U, S, Vh @ Q_A.T"), "core_not_transposed"),
        Mutant("R_B transposed", _svd(_QR + "U, S, Vh = torch.linalg.svd(scaling * R_B.T @ R_A)\nreturn Q_B @ U, S, Vh @ Q_A.T"), "core_wrong_transpose"),
        Mutant("QR of A itself", _svd(
            "Q_B, R_B = torch.linalg.qr(B)\nQ_A, R_A = torch.linalg.qr(A)\nU, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T)\nreturn Q_B @ U, S, Vh @ Q_A.T"),
            "qr_of_A"),
        Mutant("entry by entry", _svd(_QR + "U, S, Vh = torch.linalg.svd(scaling * R_B * R_A.T)\nreturn Q_B @ U, S, Vh @ Q_A.T"), "elementwise"),
        Mutant("scaling into U", _svd(_QR + "U, S, Vh = torch.linalg.svd(R_B @ R_A.T)\nreturn scaling * Q_B @ U, S, Vh @ Q_A.T"), "scaling_in_vectors"),
        Mutant("columns of Vh", _svd("U, S, Vh = torch.linalg.svd(scaling * B @ A)\nr = B.shape[1]\nreturn U[:, :r], S[:r], Vh[:, :r]"), "columns_of_Vh"),
        Mutant("Q_A not transposed", _svd(_SMALL + "return Q_B @ U, S, Vh @ Q_A"), "QA_not_transposed"),
        Mutant("V for Vh", _svd(_SMALL + "return Q_B @ U, S, Q_A @ Vh.T"), "V_for_Vh"),
        Mutant("Vh of the small one not transposed", _svd(_SMALL + "return Q_B @ U, S, (Q_A @ Vh).T"), "other_directions"),
        Mutant("the small U turned", _svd(_SMALL + "return Q_B @ U.T, S, Vh @ Q_A.T"), "other_directions"),
        Mutant("S as a matrix", _svd(_SMALL + "return Q_B @ U, torch.diag(S), Vh @ Q_A.T"), "S_as_matrix"),
        Mutant("another order", _svd(_SMALL + "return S, Q_B @ U, Vh @ Q_A.T"), "order"),
        Mutant("S alone", _svd(_SMALL + "return S"), "only_S"),
        Mutant("the product", _svd(_SMALL + "return (Q_B @ U * S) @ (Vh @ Q_A.T)"), "one_matrix"),
        Mutant("two SVDs, multiplied", _svd(
            "U, S, _ = torch.linalg.svd(B, full_matrices=False)\n"
            "_, T, Vh = torch.linalg.svd(A, full_matrices=False)\nreturn U, scaling * S * T, Vh"), "spectra_multiplied"),
        Mutant("the SVD of A", _svd("U, S, Vh = torch.linalg.svd(A, full_matrices=False)\nreturn torch.linalg.qr(B)[0] @ U, S, Vh"), "one_factor"),
        Mutant("by eigh of a Gram matrix", _svd(
            "Q, R = torch.linalg.qr(A.T)\nC = scaling * B @ R.T\nL, V = torch.linalg.eigh(C.T @ C)\nL, V = L.flip(0).clamp(min=0), V.flip(1)\n"
            "S = L.sqrt()\nreturn C @ V / S.clamp(min=1e-300), S, (Q @ V).T"), "gram"),
        Mutant("QR by Cholesky", _svd(
            "R_B = torch.linalg.cholesky(B.T @ B + 1e-30 * torch.eye(B.shape[1])).T\nR_A = torch.linalg.cholesky(A @ A.T).T\n"
            "U, S, Vh = torch.linalg.svd(scaling * R_B @ R_A.T)\nreturn B @ R_B.inverse() @ U, S, Vh @ (A.T @ R_A.inverse()).T"), "gram"),
        Mutant("eigenvalues for S", _svd(
            "Q, R = torch.linalg.qr(A.T)\nC = scaling * B @ R.T\nL, V = torch.linalg.eigh(C.T @ C)\nL, V = L.flip(0), V.flip(1)\n"
            "return C @ V / L.sqrt(), L, (Q @ V).T"), "squares"),
        Mutant("smallest first", _svd(_SMALL + "return (Q_B @ U).flip(1), S.flip(0), (Vh @ Q_A.T).flip(0)"), "ascending"),
    ],
    "6.2": [
        Mutant("entropy alone", _rank("-(p * p.log()).sum()"), "no_exp"),
        Mutant("shares of energy", _rank("torch.exp(-(p * p.log()).sum())", "S ** 2 / (S ** 2).sum()"), "squares"),
        Mutant("energy without exp", _rank("-(p * p.log()).sum()", "S ** 2 / (S ** 2).sum()"), "squares_no_exp"),
        Mutant("log2 and exp", _rank("torch.exp(-(p * p.log2()).sum())"), "log2"),
        Mutant("log10 and exp", _rank("torch.exp(-(p * p.log10()).sum())"), "log10"),
        Mutant("2 to the natural entropy", _rank("2 ** (-(p * p.log()).sum())"), "two_to_the"),
        Mutant("minus forgotten", _rank("torch.exp((p * p.log()).sum())"), "sign"),
        Mutant("minus before exp", _rank("-(p * p.log()).sum().exp()"), "minus_outside"),
        Mutant("90 % of the energy", _rank("((S ** 2).cumsum(0) < 0.9 * (S ** 2).sum()).sum() + 1"), "energy_count"),
        Mutant("not normalised", _rank("torch.exp(-(S * S.log()).sum())"), "not_normalised"),
        Mutant("divided by the norm", _rank("torch.exp(-(p * p.log()).sum())", "S / S.norm()"), "by_norm"),
        Mutant("divided by the largest", _rank("torch.exp(-(p * p.log()).sum())", "S / S.max()"), "by_largest"),
        Mutant("softmax", _rank("torch.exp(-(p * p.log()).sum())", "torch.softmax(S, 0)"), "softmax"),
        Mutant("stable rank", _rank("(S ** 2).sum() / S.max() ** 2"), "stable_rank"),
        Mutant("participation ratio", _rank("1 / (p ** 2).sum()"), "participation"),
        Mutant("sum over the largest", _rank("S.sum() / S.max()"), "nuclear"),
        Mutant("counts", _rank("len(S)"), "counted"),
        Mutant("mean", _rank("torch.exp(-(p * p.log()).mean())"), "averaged"),
        Mutant("per value", _rank("torch.exp(-p * p.log())"), "not_summed"),
        Mutant("zeros give NaN", "def effective_rank(S):\n    p = S / S.sum()\n    return torch.exp(-(p * torch.log(p)).sum())\n", "zero_log_zero"),
        Mutant("zeros replaced by a little", "def effective_rank(S):\n    p = S.clamp(min=1e-2) / S.clamp(min=1e-2).sum() if (S == 0).any() else S / S.sum()\n"
               "    return torch.exp(-(p * torch.log(p)).sum())\n", "zeros_count"),
    ],
    "6.3": [
        Mutant("norm not squared", _phi("C.norm() / min(i, j)"), "no_square"),
        Mutant("root of all", _phi("(C.norm() ** 2 / min(i, j)) ** 0.5"), "root"),
        Mutant("max", _phi("C.norm() ** 2 / max(i, j)"), "by_max"),
        Mutant("always i", _phi("C.norm() ** 2 / i"), "by_i"),
        Mutant("always j", _phi("C.norm() ** 2 / j"), "by_j"),
        Mutant("mean", _phi("(C ** 2).mean()"), "mean"),
        Mutant("not divided", _phi("(C ** 2).sum()"), "not_divided"),
        Mutant("absolute values", _phi("C.abs().sum() / min(i, j)"), "absolute"),
        Mutant("plain sum", _phi("C.sum() / min(i, j)"), "plain_sum"),
        Mutant("both cut to the smaller", _phi("(first[:min(i, j)] @ second[:min(i, j)].T).square().sum() / min(i, j)"), "both_cut"),
        Mutant("pairs only", _phi("(C.diagonal() ** 2).sum() / min(i, j)"), "pairwise"),
        Mutant("nuclear norm", _phi('torch.linalg.matrix_norm(C, "nuc") / min(i, j)'), "nuclear"),
        Mutant("spectral norm", _phi("torch.linalg.norm(C, 2) ** 2 / min(i, j)"), "spectral"),
        Mutant("largest cosine", _phi("torch.linalg.svdvals(C)[0] ** 2"), "largest"),
        Mutant("not cut", _phi("((first @ second.T) ** 2).sum() / min(i, j)"), "not_cut"),
        Mutant("second not cut", _phi("((first[:i] @ second.T) ** 2).sum() / min(i, j)"), "second_not_cut"),
        Mutant("vector i with vector j", _phi("(first[i - 1] @ second[j - 1]) ** 2"), "single"),
        Mutant("one too many", _phi("((first[:i + 1] @ second[:j + 1].T) ** 2).sum() / min(i, j)"), "off_by_one"),
        Mutant("i and j exchanged", _phi("((first[:j] @ second[:i].T) ** 2).sum() / min(i, j)"), "swapped_cuts"),
        Mutant("the table", _phi("C"), "table"),
        Mutant("a distance", _phi("1 - (C ** 2).sum() / min(i, j)"), "distance"),
        Mutant("the printed formula", _phi("(1 - (min(i, j) - (C ** 2).sum())) / min(i, j)"), "appendix_G"),
        Mutant("columns of Vh", "def phi(first, second, i, j):\n    return (first[:, :i].T @ second[:, :j]).square().sum() / min(i, j)\n", "columns_of_Vh"),
        Mutant("no transpose", "def phi(first, second, i, j):\n    return (first[:i] @ second[:j]).square().sum() / min(i, j)\n", "not_transposed"),
        Mutant("the other transpose", "def phi(first, second, i, j):\n    return (first[:i].T @ second[:j]).square().sum() / min(i, j)\n", "wrong_transpose"),
    ],
    "6.4": [
        Mutant("zero", _chance("0"), "zero"),
        Mutant("the smaller", _chance("min(i, j) / d"), "smaller"),
        Mutant("one pair", _chance("1 / d"), "one_pair"),
        Mutant("all pairs", _chance("i * j / d"), "not_divided"),
        Mutant("share of the space", _chance("i / d * j / d"), "d_twice"),
        Mutant("the second", _chance("j / d"), "only_j"),
        Mutant("the first", _chance("i / d"), "only_i"),
        Mutant("sum", _chance("(i + j) / d"), "added"),
        Mutant("root", _chance("(max(i, j) / d) ** 0.5"), "root"),
        Mutant("a cosine", _chance("1 / d ** 0.5"), "cosine"),
        Mutant("no d", _chance("min(i, j) / max(i, j)"), "ratio"),
        Mutant("rounded down", _chance("max(i, j) // d"), "rounded"),
        Mutant("what must be shared", _chance("max(0, i + j - d) / min(i, j)"), "shared_room"),
    ],
    "6.5": [
        Mutant("upside down", _amplification("overlap / norm, norm / chance"), "upside_down"),
        Mutant("norm of the first r", _amplification("S[:r].norm() / overlap, norm / chance"), "norm_cut"),
        Mutant("spectral norm", _amplification("S[0] / overlap, norm / chance"), "spectral"),
        Mutant("sum of S", _amplification("S.sum() / overlap, norm / chance"), "nuclear"),
        Mutant("squares", _amplification("(norm / overlap) ** 2, norm / chance"), "squared"),
        Mutant("all of W", _amplification("norm / W.norm(), norm / chance"), "whole_W"),
        Mutant("not cut", _amplification(_BOTH, overlap="(U.T @ W @ Vh.T).norm()"), "not_cut"),
        Mutant("diagonal", _amplification(_BOTH, overlap="(U[:, :r].T @ W @ Vh[:r].T).diagonal().norm()"), "diagonal"),
        Mutant("one side", _amplification(_BOTH, overlap="(U[:, :r].T @ W).norm()"), "one_side"),
        Mutant("columns of Vh", _amplification(_BOTH, overlap="(U[:, :r].T @ W @ Vh[:, :r]).norm()"), "columns_of_Vh"),
        Mutant("rows of U", _amplification(_BOTH, overlap="(U[:r] @ W @ Vh[:r].T).norm()"), "rows_of_U"),
        Mutant("Vh not transposed", _amplification(_BOTH, overlap="(U[:, :r].T @ W @ Vh[:r]).norm()"), "Vh_not_transposed"),
        Mutant("U not transposed", _amplification(_BOTH, overlap="(U[:, :r] @ W @ Vh[:r].T).norm()"), "U_not_transposed"),
        Mutant("one number", _amplification("norm / overlap"), "one_number"),
        Mutant("swapped", _amplification("norm / chance, norm / overlap"), "swapped"),
        Mutant("overlaps", _amplification("overlap, chance"), "overlap"),
        Mutant("the random overlap", _amplification("norm / overlap, chance"), "chance_overlap"),
        Mutant("root of r", _amplification(_BOTH, chance="(r * W.square().sum() / W.numel()) ** 0.5"), "chance_root_r"),
        Mutant("r squared", _amplification(_BOTH, chance="r ** 2 * W.norm() / W.numel() ** 0.5"), "chance_r_squared"),
        Mutant("no r", _amplification(_BOTH, chance="W.norm() / W.numel() ** 0.5"), "chance_without_r"),
        Mutant("no root", _amplification(_BOTH, chance="r * W.norm() / W.numel()"), "chance_no_root"),
        Mutant("d is the width", _amplification(_BOTH, chance="r * W.norm() / W.shape[1]"), "chance_in"),
        Mutant("random meets all of W", _amplification("norm / overlap, norm / W.norm()"), "chance_whole_W"),
        Mutant("overlap over chance", _amplification("norm / overlap, overlap / chance"), "ratio_of_factors"),
    ],
    "6.6": [
        Mutant("of the update", _nearest("(U1[:, :k].T @ U0).abs().amax(1)", _TWO.replace("W1", "W1 - W0")), "of_the_update"),
        Mutant("right vectors", _nearest("(V1[:k] @ V0.T).abs().amax(1)"), "right"),
        Mutant("no abs", _nearest("(U1[:, :k].T @ U0).amax(1)"), "no_abs"),
        Mutant("same place", _nearest("(U1[:, :k] * U0[:, :k]).sum(0).abs()"), "same_place"),
        Mutant("W0's first k", _nearest("(U1[:, :k].T @ U0[:, :k]).abs().amax(1)"), "few_old"),
        Mutant("minimum", _nearest("(U1[:, :k].T @ U0).abs().amin(1)"), "smallest"),
        Mutant("mean", _nearest("(U1[:, :k].T @ U0).abs().mean(1)"), "averaged"),
        Mutant("projection", _nearest("(U1[:, :k].T @ U0).norm(dim=1)"), "projection"),
        Mutant("squared", _nearest("(U1[:, :k].T @ U0).square().amax(1)"), "squared"),
        Mutant("exchanged", _nearest("(U0[:, :k].T @ U1).abs().amax(1)"), "old_ones"),
        Mutant("the other axis", _nearest("(U1[:, :k].T @ U0).abs().amax(0)"), "wrong_axis"),
        Mutant("all of W1", _nearest("(U1.T @ U0).abs().amax(1)"), "not_cut"),
        Mutant("overall", _nearest("(U1[:, :k].T @ U0).abs().max()"), "overall"),
        Mutant("how many", _nearest("((U1[:, :k].T @ U0).abs().amax(1) < 0.5).sum()"), "counted"),
        Mutant("max with its indices", _nearest("(U1[:, :k].T @ U0).abs().max(1)"), "values_and_indices"),
        Mutant("the table", _nearest("(U1[:, :k].T @ U0).abs()"), "table"),
        Mutant("distance", _nearest("1 - (U1[:, :k].T @ U0).abs().amax(1)"), "distance"),
        Mutant("full matrices", _nearest("(U1[:, :k].T @ U0).abs().amax(1)", _TWO.replace("full_matrices=False", "full_matrices=True")), "null_space"),
        Mutant("scaled by S", _nearest("((U1 * S1)[:, :k].T @ U0).abs().amax(1)"), "weighted"),
    ],
}

ALTERNATIVES = {
    "6.1": [
        _svd("Q, R = torch.linalg.qr(B)\nU, S, Vh = torch.linalg.svd(scaling * R @ A, full_matrices=False)\nreturn Q @ U, S, Vh"),
        _svd("Ub, Sb, Vb = torch.linalg.svd(B, full_matrices=False)\nUa, Sa, Va = torch.linalg.svd(A, full_matrices=False)\n"
             "U, S, Vh = torch.linalg.svd(scaling * (Sb[:, None] * Vb) @ (Ua * Sa))\nreturn Ub @ U, S, Vh @ Va"),
        _svd("Q, R = torch.linalg.qr(A.mT)\nU, S, Vh = torch.linalg.svd(B @ R.mT, full_matrices=False)\n"
             "sign = 1 if scaling >= 0 else -1\nreturn sign * U, abs(scaling) * S, Vh @ Q.mT"),
    ],
    "6.2": [
        "def effective_rank(S):\n    p = S / S.sum()\n    return torch.special.entr(p).sum().exp()\n",
        "def effective_rank(S):\n    p = S[S > 0] / S.sum()\n    return float(2 ** -(p * torch.log2(p)).sum())\n",
        "def effective_rank(S):\n    p = (S / S.sum()).tolist()\n    return math.exp(-sum(x * math.log(x) for x in p if x > 0))\n",
    ],
    "6.3": [
        _phi("torch.linalg.matrix_norm(C) ** 2 / min(i, j)"),
        "def phi(first, second, i, j):\n    return float(sum((u @ v) ** 2 for u in first[:i] for v in second[:j])) / min(i, j)\n",
        "def phi(first, second, i, j):\n    P, Q = first[:i].T @ first[:i], second[:j].T @ second[:j]\n    return torch.trace(P @ Q) / min(i, j)\n",
    ],
    "6.4": [
        _chance("i * j / d / min(i, j)"),
        "def phi_by_chance(i, j, d):\n    total = 0.0\n    for _ in range(500):\n        P = torch.linalg.qr(torch.randn(d, i))[0]\n"
        "        Q = torch.linalg.qr(torch.randn(d, j))[0]\n        total += (P.T @ Q).square().sum() / min(i, j)\n    return total / 500\n",
    ],
    "6.5": [
        _amplification(_BOTH, overlap="torch.linalg.norm(U[:, :r].T @ W @ Vh[:r].T)", chance="r * W.square().mean().sqrt()"),
        "def amplification(W, U, S, Vh, r):\n    P, Q = U[:, :r] @ U[:, :r].T, Vh[:r].T @ Vh[:r]\n    size = S.square().sum().sqrt()\n"
        "    return [float(size / (P @ W @ Q).norm()), float(size / r / W.norm() * math.sqrt(W.shape[0] * W.shape[1]))]\n",
    ],
    "6.6": [
        _nearest("(U0.T @ U1[:, :k]).abs().max(dim=0).values"),
        "def nearest_old(W0, W1, k):\n    U0 = torch.linalg.svd(W0, full_matrices=False).U\n    U1 = torch.linalg.svd(W1, full_matrices=False).U\n"
        "    return torch.stack([F.cosine_similarity(U1[:, c, None], U0, dim=0).abs().max() for c in range(k)])\n",
    ],
}
