"""Wrong and right answers for lab 03: floors in the wrong norm, alpha's factor upside down, global learning rates, one optimizer's rule for both."""

from . import Mutant


def _floor(expression: str, before: str = "") -> str:
    return f"def floor(delta, x, r):\n    n, d_out = len(x), len(delta)\n    {before or 'pass'}\n    return {expression}\n"


_C = "C = x.T @ x / n; values, axes = torch.linalg.eigh(C); root = (axes * values.clamp(min=0).sqrt()) @ axes.T"
_GRAM = "M = x @ delta.T; e = torch.linalg.eigvalsh(M.T @ M)"  # from small to large
_Y = "S = torch.linalg.svdvals(x @ delta.T)"


def _rescaled(expression: str) -> str:
    return f"def rescaled_B(B, alpha, new_alpha):\n    return {expression}\n"


def _rates(adam: str, sgd: str | None = None) -> str:
    return f'def twin_rates(lr_A, lr_B, k, optimizer):\n    if optimizer == "adam":\n        return {adam}\n    return {sgd or adam}\n'


def _first(sgd: str, adam: str) -> str:
    return (
        "def first_update(G, A, lr, scaling, optimizer):\n    s = scaling\n"
        f'    if optimizer == "sgd":\n        return {sgd}\n    return {adam}\n'
    )


_SGD, _ADAM = "-lr * s**2 * G @ A.T @ A", "-lr * s * (G @ A.T).sign() @ A"


def _fair(adam: str, sgd: str) -> str:
    return f'def fair_alpha(r0, alpha0, r, optimizer):\n    if optimizer == "adam":\n        return {adam}\n    return {sgd}\n'


MUTANTS = {
    "3.1": [
        Mutant("the spectrum of ΔW alone", _floor("(torch.linalg.svdvals(delta)[r:] ** 2).sum() / d_out"), "inputs_forgotten"),
        Mutant("head instead of tail", _floor("(S[:r] ** 2).sum() / (n * d_out)", _Y), "head"),
        Mutant("no squares", _floor("S[r:].sum() / (n**0.5 * d_out)", _Y), "not_squared"),
        Mutant("a root at the end", _floor("((S[r:] ** 2).sum() / (n * d_out)) ** 0.5", _Y), "root"),
        Mutant("forgets d_out", _floor("(S[r:] ** 2).sum() / n", _Y), "no_outputs"),
        Mutant("divides by d_in", _floor("(S[r:] ** 2).sum() / (n * delta.shape[1])", _Y), "by_d_in"),
        Mutant("forgets n", _floor("(S[r:] ** 2).sum() / d_out", _Y), "sum_over_inputs"),
        Mutant("the sum, no mean", _floor("(S[r:] ** 2).sum()", _Y), "sum"),
        Mutant("mean of the tail", _floor("(S[r:] ** 2).mean() / n if r < len(S) else 0.0", _Y), "by_tail"),
        Mutant("counts from 1", _floor("(S[r - 1 :] ** 2).sum() / (n * d_out)", _Y), "one_early"),
        Mutant("skips one", _floor("(S[r + 1 :] ** 2).sum() / (n * d_out)", _Y), "one_late"),
        Mutant("the next value alone", _floor("(S[r : r + 1] ** 2).sum() / (n * d_out)", _Y), "next_only"),
        Mutant("the last r", _floor("(S[-r:] ** 2).sum() / (n * d_out)", _Y), "last_r"),
        Mutant("nothing cut", _floor("(x @ delta.T).square().mean()"), "not_cut"),
        Mutant("C instead of its root", _floor("(torch.linalg.svdvals(delta @ C)[r:] ** 2).sum() / d_out", _C), "covariance_whole"),
        Mutant("centred covariance", _floor(
            "(torch.linalg.svdvals((x - x.mean(0)) @ delta.T)[r:] ** 2).sum() / (n * d_out)"), "centred"),
        Mutant("n - 1", _floor("(S[r:] ** 2).sum() / ((n - 1) * d_out)", _Y), "n_minus_1"),
        Mutant("a share", _floor("(S[r:] ** 2).sum() / (S ** 2).sum()", _Y), "relative"),
        Mutant("a row of numbers", _floor("S[r:] ** 2 / (n * d_out)", _Y), "not_summed"),
        Mutant("cuts ΔW by its own spectrum", _floor(
            "(x @ (delta - (U[:, :r] * S[:r]) @ Vh[:r]).T).square().mean()", "U, S, Vh = torch.linalg.svd(delta, full_matrices=False)"), "plain_cut"),
        Mutant("ΔW's spectrum, not squared", _floor("torch.linalg.svdvals(delta)[r:].sum() / d_out"), "inputs_forgotten_and_not_squared"),
        Mutant("ΔW's spectrum, not divided", _floor("(torch.linalg.svdvals(delta)[r:] ** 2).sum()"), "inputs_forgotten_and_no_outputs"),
        Mutant("ΔW's spectrum over all entries", _floor(
            "(torch.linalg.svdvals(delta)[r:] ** 2).sum() / delta.numel()"), "inputs_forgotten_and_by_d_in_d_out"),
        Mutant("no squares, n as for squares", _floor("S[r:].sum() / (n * d_out)", _Y), "not_squared"),
        Mutant("a norm, not squared", _floor("(S[r:] ** 2).sum() ** 0.5 / (n * d_out)", _Y), "root"),
        Mutant("squares the sum", _floor("S[r:].sum() ** 2 / (n * d_out)", _Y), "square_of_sum"),
        Mutant("mean of the tail alone", _floor("(S[r:] ** 2).mean() if r < len(S) else 0.0", _Y), "tail_mean"),
        Mutant("eigenvalues squared", _floor("(e[r:] ** 2).sum() / (n * d_out)", _GRAM + ".flip(0)"), "squared_again"),
        Mutant("eigenvalues as they are sorted", _floor("e[r:].sum() / (n * d_out)", _GRAM), "ascending"),
        Mutant("ΔW's head", _floor("(torch.linalg.svdvals(delta)[:r] ** 2).sum() / d_out"), "inputs_forgotten_and_head"),
    ],
    "3.2": [
        Mutant("upside down", _rescaled("B * new_alpha / alpha"), "upside_down"),
        Mutant("leaves B", _rescaled("B"), "unchanged"),
        Mutant("the root", _rescaled("B * (alpha / new_alpha) ** 0.5"), "root"),
        Mutant("squared", _rescaled("B * (alpha / new_alpha) ** 2"), "squared"),
        Mutant("forgets the new alpha", _rescaled("B * alpha"), "only_old"),
        Mutant("forgets the old alpha", _rescaled("B / new_alpha"), "only_new"),
        Mutant("the old scaling", _rescaled("B * alpha / B.shape[1]"), "old_scaling"),
        Mutant("the new scaling", _rescaled("B * new_alpha / B.shape[1]"), "new_scaling"),
        Mutant("takes the new scaling out", _rescaled("B / (new_alpha / B.shape[1])"), "divided_by_new_scaling"),
        Mutant("the difference", _rescaled("B * (alpha - new_alpha)"), "difference"),
        Mutant("r once more", _rescaled("B * alpha / new_alpha / B.shape[1]"), "r_too_many"),
        Mutant("in place", "def rescaled_B(B, alpha, new_alpha):\n    B *= alpha / new_alpha\n    return B\n", "changes_input"),
        Mutant("in place, without return", "def rescaled_B(B, alpha, new_alpha):\n    B *= alpha / new_alpha\n", "changes_input"),
    ],
    "3.3": [
        Mutant("the global rate", _rates("(lr_A / k, lr_B / k)"), "global_rate"),
        Mutant("the global rate, k squared for SGD", _rates("(lr_A / k, lr_B / k)", "(lr_A / k**2, lr_B / k**2)"), "global_rate"),
        Mutant("k for both optimizers", _rates("(lr_A, lr_B / k)"), "sgd_like_adam"),
        Mutant("k squared for both", _rates("(lr_A, lr_B / k**2)"), "adam_like_sgd"),
        Mutant("optimizers swapped", _rates("(lr_A, lr_B / k**2)", "(lr_A, lr_B / k)"), "optimizers_swapped"),
        Mutant("multiplies", _rates("(lr_A, lr_B * k)", "(lr_A, lr_B * k**2)"), "multiplied"),
        Mutant("multiplies both", _rates("(lr_A * k, lr_B * k)"), "multiplied"),
        Mutant("the root of k", _rates("(lr_A, lr_B / k**0.5)", "(lr_A, lr_B / k)"), "root"),
        Mutant("the root of k, shared", _rates("(lr_A / k**0.5, lr_B / k**0.5)", "(lr_A / k, lr_B / k)"), "root"),
        Mutant("A for B", _rates("(lr_A / k, lr_B)", "(lr_A / k**2, lr_B)"), "A_for_B"),
        Mutant("nothing changes", _rates("(lr_A, lr_B)"), "unchanged"),
        Mutant("B first", _rates("(lr_B / k, lr_A)", "(lr_B / k**2, lr_A)"), "order"),
        Mutant("factors", _rates("(1, 1 / k)", "(1, 1 / k**2)"), "factors"),
        Mutant("one rate", _rates("lr_B / k", "lr_B / k**2"), "one_rate"),
        Mutant("A, too, under SGD", _rates("(lr_A, lr_B / k)", "(lr_A / k, lr_B / k)"), "sgd_moves_A"),
        Mutant("the gradient alone", _rates("(lr_A, lr_B)", "(lr_A, lr_B / k)"), "gradient_only"),
        Mutant("the gradient alone, of A too", _rates("(lr_A, lr_B)", "(lr_A / k, lr_B / k)"), "gradient_only"),
        Mutant("Adam cancels everything", _rates("(lr_A, lr_B)", "(lr_A, lr_B / k**2)"), "adam_unmoved"),
        Mutant("asks for SGD in capitals",
               'def twin_rates(lr_A, lr_B, k, optimizer):\n    return lr_A, lr_B / (k**2 if optimizer == "SGD" else k)\n', "sgd_like_adam"),
        Mutant("or a text, which is always true",
               'def twin_rates(lr_A, lr_B, k, optimizer):\n    return lr_A, lr_B / (k**2 if optimizer == "sgd" or "SGD" else k)\n', "adam_like_sgd"),
        Mutant("k cubed under SGD", _rates("(lr_A, lr_B / k)", "(lr_A, lr_B / k**3)"), "sgd_wrong"),
    ],
    "3.4": [
        Mutant("SGD: scaling once", _first("-lr * s * G @ A.T @ A", _ADAM), "scaling_once"),
        Mutant("Adam: scaling twice", _first(_SGD, "-lr * s**2 * (G @ A.T).sign() @ A"), "scaling_twice"),
        Mutant("scaling forgotten", _first("-lr * G @ A.T @ A", "-lr * (G @ A.T).sign() @ A"), "scaling_missing"),
        Mutant("uphill", _first("lr * s**2 * G @ A.T @ A", "lr * s * (G @ A.T).sign() @ A"), "uphill"),
        Mutant("Adam as SGD", _first(_SGD, _SGD), "adam_as_sgd"),
        Mutant("asks for Adam with a capital",
               f'def first_update(G, A, lr, scaling, optimizer):\n    s = scaling\n    return {_ADAM} if optimizer == "Adam" else {_SGD}\n',
               "adam_as_sgd"),
        Mutant("SGD as Adam", _first(_ADAM, _ADAM), "sgd_as_adam"),
        Mutant("optimizers swapped", _first(_ADAM, _SGD), "optimizers_swapped"),
        Mutant("full fine-tuning", _first("-lr * G", "-lr * G.sign()"), "full_fine_tuning"),
        Mutant("sign of G", _first(_SGD, "-lr * s * G.sign() @ A.T @ A"), "sign_of_another"),
        Mutant("sign of the product", _first(_SGD, "-lr * s * (G @ A.T @ A).sign()"), "sign_of_another"),
        Mutant("signs of everything", _first(_SGD, "-lr * s * (G @ A.T).sign() @ A.sign()"), "sign_of_A"),
        Mutant("B alone", _first("-lr * s * G @ A.T", "-lr * (G @ A.T).sign()"), "B_alone"),
        Mutant("lr forgotten", _first("-(s**2) * G @ A.T @ A", "-s * (G @ A.T).sign() @ A"), "lr_missing"),
        Mutant("both factors", _first("(-lr * s * G @ A.T, A)", "(-lr * (G @ A.T).sign(), A)"), "two_factors"),
        Mutant("transposed", _first(f"({_SGD}).T", f"({_ADAM}).T"), "transposed"),
        Mutant("scaling three times", _first("-lr * s**3 * G @ A.T @ A", _ADAM), "other_factor"),
        Mutant("lr twice", _first("-(lr**2) * s**2 * G @ A.T @ A", _ADAM), "other_factor"),
    ],
    "3.5": [
        Mutant("keeps alpha / r", _fair("alpha0 * r / r0", "alpha0 * r / r0"), "same_scaling"),
        Mutant("the same alpha for both", _fair("alpha0", "alpha0"), "adam_for_both"),
        Mutant("the root for both", _fair("alpha0 * (r / r0) ** 0.5", "alpha0 * (r / r0) ** 0.5"), "sgd_for_both"),
        Mutant("swapped", _fair("alpha0 * (r / r0) ** 0.5", "alpha0"), "optimizers_swapped"),
        Mutant("alpha = 2r", _fair("2 * r", "2 * r"), "two_r"),
        Mutant("the scaling", _fair("alpha0 / r", "alpha0 / (r * r0) ** 0.5"), "scaling_not_alpha"),
        Mutant("the root upside down", _fair("alpha0", "alpha0 * (r0 / r) ** 0.5"), "root_upside_down"),
        Mutant("alpha taken for the scaling", _fair("alpha0 * r0 / r", "alpha0 * (r0 / r) ** 0.5"), "alpha_as_scaling"),
        Mutant("as for rsLoRA", _fair("alpha0 * (r0 / r) ** 0.5", "alpha0"), "rslora_alpha"),
        Mutant("asks for Adam with a capital",
               'def fair_alpha(r0, alpha0, r, optimizer):\n    return alpha0 if optimizer == "Adam" else alpha0 * (r / r0) ** 0.5\n',
               "sgd_for_both"),
        Mutant("below 0 under SGD", _fair("alpha0", "-alpha0 * (r / r0) ** 0.5"), "negative"),
        Mutant("divides once more", _fair("alpha0 * r0 / r", "alpha0 * r0 / r"), "divided_twice"),
        Mutant("squared", _fair("alpha0", "alpha0 * (r / r0) ** 2"), "squared"),
        Mutant("keeps alpha / r under SGD", _fair("alpha0", "alpha0 * r / r0"), "sgd_wrong"),
        Mutant("keeps alpha / r under Adam", _fair("alpha0 * r / r0", "alpha0 * (r / r0) ** 0.5"), "adam_wrong"),
    ],
}

ALTERNATIVES = {
    "3.1": [
        _floor("float((torch.linalg.svdvals(delta @ root)[r:] ** 2).sum()) / d_out", _C),
        _floor("(torch.linalg.svdvals(delta @ L)[r:] ** 2).sum() / d_out", "L = torch.linalg.cholesky(x.T @ x / n)"),
        """
def floor(delta, x, r):
    y = x @ delta.T
    U, S, Vh = torch.linalg.svd(y, full_matrices=False)
    best = (U[:, :r] * S[:r]) @ Vh[:r]
    return ((y - best) ** 2).mean()
""",
        """
def floor(delta, x, r):
    eigenvalues = np.linalg.eigvalsh((delta @ (x.T @ x / len(x)) @ delta.T).numpy())[::-1]
    return np.clip(eigenvalues, 0, None)[r:].sum() / len(delta)
""",
    ],
    "3.2": [
        _rescaled("alpha * B / new_alpha"),
        "def rescaled_B(B, alpha, new_alpha):\n    r = B.shape[1]\n    return (alpha / r) / (new_alpha / r) * B.clone()\n",
    ],
    "3.3": [
        _rates("(lr_A, lr_B / k)", "(lr_A, lr_B / k / k)"),
        'def twin_rates(lr_A, lr_B, k, optimizer):\n    power = {"adam": 1, "sgd": 2}[optimizer]\n    return [lr_A, lr_B * k**-power]\n',
        "def twin_rates(lr_A, lr_B, k, optimizer):\n    p = 1 + (optimizer == 'sgd')\n    return torch.tensor([lr_A, lr_B / k**p], dtype=torch.float64)\n",
    ],
    "3.4": [
        """
def first_update(G, A, lr, scaling, optimizer):
    A = torch.nn.Parameter(A.clone())
    B = torch.nn.Parameter(torch.zeros(len(G), len(A), dtype=A.dtype))
    (G * (scaling * B @ A)).sum().backward()
    step = torch.optim.SGD([B], lr=lr) if optimizer == "sgd" else torch.optim.Adam([B], lr=lr, eps=0.0)
    step.step()
    return (scaling * B @ A).detach()
""",
        _first("-lr * s * s * G @ (A.T @ A)", "-(lr * s) * torch.sign(s * G @ A.T) @ A"),
        """
def first_update(G, A, lr, scaling, optimizer):
    total = torch.zeros_like(G)
    for a in A:
        gradient = scaling * G @ a
        step = gradient if optimizer == "sgd" else torch.where(gradient > 0, 1.0, -1.0).to(G.dtype)
        total -= lr * scaling * torch.outer(step, a)
    return total
""",
    ],
    "3.5": [
        _fair("float(alpha0)", "alpha0 * math.sqrt(r / r0)"),
        _fair("r * (alpha0 / r0) * (r0 / r)", "r * (alpha0 / r0) * (r0 / r) ** 0.5"),
        "def fair_alpha(r0, alpha0, r, optimizer):\n    power = {'adam': 1, 'sgd': 2}[optimizer]\n    "
        "return torch.tensor(r * alpha0 / r0 * (r0 / r) ** (1 / power))\n",
    ],
}
