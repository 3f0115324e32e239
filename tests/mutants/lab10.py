"""Wrong and right answers for lab 10: dropout left on, gradients left behind, None taken for 0, signs lost, optimizers made too early."""

from . import Mutant


def _apart(expression: str, before: str = "model.eval(), base.eval()", after: str = "model.train(m), base.train(b)", grad: str = "torch.no_grad()") -> str:
    return (
        f"def apart(model, base, x):\n    m, b = model.training, base.training\n    {before or 'pass'}\n    with {grad}:\n"
        f"        y, z = model(x), base(x)\n    {after or 'pass'}\n    return {expression}\n"
    )


_RIGHT = "float((y - z).abs().max() / z.abs().max())"
_WHO = """
def who_learns(model, x, y):
    {before}
    loss = ((model(x) - y) ** 2).mean()
    {grads}
    out = {{}}
    for n, p in model.named_parameters():
        {rule}
    {after}
    return out
"""
_OLD = "old = {n: p.grad for n, p in model.named_parameters()}"
_SET = "[setattr(p, 'grad', None) for p in model.parameters()]"
_BACK = "[setattr(p, 'grad', old[n]) for n, p in model.named_parameters()]"
_RULE = "out[n] = 'frozen' if not p.requires_grad else 'none' if p.grad is None else 'moves' if p.grad.any() else 'zero'"


def _who(rule: str = _RULE, before: str = f"{_OLD}; {_SET}", after: str = _BACK, grads: str = "loss.backward()") -> str:
    return _WHO.format(before=before or "pass", grads=grads, rule=rule, after=after or "pass")


def _times(expression: str, delta: str = "scaling * B @ A") -> str:
    return f"def times_counted(W, W0, A, B, scaling):\n    D = {delta}\n    d = W - W0\n    return {expression}\n"


_T = 'if c["adapted"] < c["wanted"]: return "targets"'
_N = 'if c["grad_A"] is None and c["grad_B"] is None: return "no gradient"'
_Z = 'if c["A"] == 0 and c["B"] == 0: return "both zero"'
_O = 'if c["B_moved"] == 0: return "optimizer"'


def _flat(*rules: str, last: str = 'return "healthy"') -> str:
    return "def why_flat(c):\n" + "".join(f"    {rule}\n" for rule in (*rules, last))


_PLAIN = {
    "early": "pass",
    "put": "apply_lora(model, r=3, alpha=6, target_modules=targets)",
    "head": "model.head.requires_grad_(True)",
    "late": "optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)",
    "mode": "model.train()",
    "saved": "{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}",
    "end": "model.eval()",
    "predict": "model(x)",
}


def _tune(**changes: str) -> str:
    part = _PLAIN | changes
    return f"""
def fine_tune(model, targets, x, y, steps, lr):
    from lora_lab import apply_lora
    {part["early"]}
    {part["put"]}
    {part["head"]}
    {part["late"]}
    {part["mode"]}
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    saved = {part["saved"]}
    {part["end"]}
    with torch.no_grad():
        return saved, {part["predict"]}
"""


_SEALED = """
def discharge(W, W0, A, B, scaling):
    D = scaling * B @ A
    d = W - W0
    k = float((d * D).sum() / (D * D).sum())
    rest = float((d - k * D).norm() / D.norm())
    turned = float((d - D.T).norm() / D.norm())
    right = W0 + D
    {rule}
    return word, {repair}
"""
_WARD = {
    "multiple": "({0: 'no effect', 1: 'healthy', 2: 'merged twice'}[round(k)] if abs(k - round(k)) < 0.2 else 'scaling')",
    "else": "('transposed' if turned < 0.3 else 'other base')",
}


def _ward(rule: str = "word = {multiple} if rest < 0.3 else {else}", repair: str = "right") -> str:
    return _SEALED.format(rule=rule.format(**_WARD), repair=repair)


_EARLY = {"early": "optimizer = torch.optim.Adam(model.parameters(), lr)", "late": "pass"}
_LORA_ONLY = {"saved": "{n: p.detach().clone() for n, p in model.named_parameters() if 'lora_' in n}"}

MUTANTS = {
    "10.1": [
        Mutant("no eval", _apart(_RIGHT, before="", after=""), "dropout_active"),
        Mutant("only the model", _apart(_RIGHT, before="model.eval()"), "base_not_in_eval"),
        Mutant("left in eval", _apart(_RIGHT, after=""), "left_in_eval"),
        Mutant("train at the end", _apart(_RIGHT, after="model.train(), base.train()"), "always_train"),
        Mutant("puts back one", _apart(_RIGHT, after="model.train(m)"), "modes_changed"),
        Mutant("the mean", _apart("float((y - z).abs().mean() / z.abs().max())"), "mean"),
        Mutant("both means", _apart("float((y - z).abs().mean() / z.abs().mean())"), "mean_over_mean"),
        Mutant("without abs", _apart("float((y - z).max() / z.abs().max())"), "signed"),
        Mutant("not divided", _apart("float((y - z).abs().max())"), "absolute"),
        Mutant("by the model's own", _apart("float((y - z).abs().max() / y.abs().max())"), "by_own"),
        Mutant("entry by entry", _apart("float(((y - z) / z).abs().max())"), "elementwise"),
        Mutant("norms", _apart("float((y - z).norm() / z.norm())"), "norms"),
        Mutant("allclose", _apart("torch.allclose(y, z)"), "a_bool"),
        Mutant("mse", _apart("float(((y - z) ** 2).mean())"), "squared"),
        Mutant("over the mean", _apart("float((y - z).abs().max() / z.abs().mean())"), "by_mean"),
        Mutant("one for each", _apart("(y - z).abs() / z.abs().max()"), "not_reduced"),
    ],
    "10.2": [
        Mutant("old gradients count", _who(before=_OLD), "old_gradients"),
        Mutant("zero_grad after", _who(before="pass", after="model.zero_grad()"), "old_gradients"),
        Mutant("zero_grad before", _who(before="model.zero_grad()", after="model.zero_grad()"), "gradients_lost"),
        Mutant("leaves its own behind", _who(after=_BACK.replace("in model.named_parameters()]", "in model.named_parameters() if old[n] is not None]")),
               "gradients_left"),
        Mutant("old ones thrown away", _who(after="pass"), "gradients_lost"),
        Mutant("requires_grad is enough", _who(rule="out[n] = 'moves' if p.requires_grad else 'frozen'"), "only_requires_grad"),
        Mutant("None is zero", _who(rule="out[n] = 'frozen' if not p.requires_grad else 'moves' if p.grad is not None and p.grad.any() else 'zero'"),
               "none_is_zero"),
        Mutant("zero is None", _who(rule="out[n] = 'frozen' if not p.requires_grad else 'moves' if p.grad is not None and p.grad.any() else 'none'"),
               "zero_is_none"),
        Mutant("frozen is none", _who(rule="out[n] = 'none' if p.grad is None else 'moves' if p.grad.any() else 'zero'"), "frozen_missed"),
        Mutant("the sum, rounded", _who(rule=_RULE.replace("p.grad.any()", "p.grad.mean().abs() > 10")), "sum"),
        Mutant("asks for all", _who(grads="torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)"), "asks_frozen"),
        Mutant("no allow_unused", _who(grads="torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])"), "allow_unused"),
        Mutant("a step", _who(after=f"torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step(); {_BACK}"), "takes_a_step"),
        Mutant("only what trains", _who(rule=f"if p.requires_grad: {_RULE}"), "names_missing"),
    ],
    "10.3": [
        Mutant("B = 0 is ill", _flat(_T, _N, 'if c["B"] == 0: return "both zero"', _O), "b_zero"),
        Mutant("zero is none", _flat(_T, 'if not c["grad_A"] and not c["grad_B"]: return "no gradient"', _Z, _O), "zero_is_none"),
        Mutant("grad_A alone", _flat(_T, _Z, 'if not c["grad_A"]: return "no gradient"', _O), "grad_a_zero"),
        Mutant("the optimizer first", _flat(_T, _O, _N, _Z), "order"),
        Mutant("no coverage", _flat(_N, _Z, _O), "coverage_missed"),
        Mutant("compares None", _flat(_T, 'if c["grad_B"] > 0 and c["B_moved"] == 0: return "optimizer"', _N, _Z), "compares_none"),
        Mutant("forgets the optimizer", _flat(_T, _N, _Z), "optimizer_missed"),
        Mutant("forgets both zero", _flat(_T, _N, 'if c["grad_B"] and c["B_moved"] == 0: return "optimizer"'), "both_zero_missed"),
        Mutant("other words", _flat(_T, _N, _Z, 'if c["B_moved"] == 0: return "wrong optimizer"'), "unknown_word"),
        Mutant("always healthy", _flat(), "always_the_same"),
        Mutant("<=", _flat('if c["adapted"] <= c["wanted"]: return "targets"', _N, _Z, _O), "always_the_same"),
        Mutant("the two exchanged", _flat(_T, 'if c["A"] + c["B"] == 0: return "no gradient"', 'if c["grad_B"] is None: return "both zero"', _O), "swapped"),
        Mutant("forgets None", _flat(_T, _Z, 'if c["grad_B"] is not None and c["B_moved"] == 0: return "optimizer"'), "none_missed"),
        Mutant("nothing moves", _flat(_T, 'if c["B_moved"] == 0 and not c["grad_B"]: return "both zero"', _O), "none_is_zero"),
    ],
    "10.4": [
        Mutant("norms", _times("float(d.norm() / D.norm())"), "norms"),
        Mutant("no scaling", _times("float((d * D).sum() / (D * D).sum())", "B @ A"), "scaling_missing"),
        Mutant("scaled twice", _times("float((d * D).sum() / (D * D).sum())", "scaling * scaling * B @ A"), "scaling_twice"),
        Mutant("entry by entry", _times("float((d / D).mean())"), "elementwise"),
        Mutant("the whole weight", _times("float((W * D).sum() / (D * D).sum())"), "base_not_subtracted"),
        Mutant("cosine", _times("float((d * D).sum() / d.norm() / D.norm())"), "cosine"),
        Mutant("sums", _times("float(d.sum() / D.sum())"), "sums"),
        Mutant("rounded", _times("round(float((d * D).sum() / (D * D).sum()))"), "rounded"),
        Mutant("magnitude", _times("abs(float((d * D).sum() / (D * D).sum()))"), "magnitude"),
        Mutant("turned", _times("float(-(d * D).sum() / (D * D).sum())"), "sign"),
        Mutant("inner product", _times("float((d * D).sum())"), "not_divided"),
        Mutant("by the norm", _times("float((d * D).sum() / D.norm())"), "by_norm"),
        Mutant("largest", _times("float(d.abs().max() / D.abs().max())"), "largest"),
        Mutant("a matrix", _times("d / (D + 1e-9)"), "not_reduced"),
    ],
    "10.5": [
        Mutant("as found", _tune(**_EARLY, head="pass", **_LORA_ONLY, end="pass"), "optimizer_and_head_not_saved"),
        Mutant("optimizer too early", _tune(**_EARLY), "optimizer"),
        Mutant("head frozen", _tune(head="pass", saved="{n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad or 'head' in n}"),
               "head_frozen"),
        Mutant("only the factors held", _tune(late="optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if 'lora_' in n], lr)"),
               "head_not_held"),
        Mutant("only A and B saved", _tune(**_LORA_ONLY), "head_not_saved"),
        Mutant("head frozen, A and B saved", _tune(head="pass"), "head_not_saved"),
        Mutant("no eval", _tune(end="pass"), "dropout_active"),
        Mutant("no copies", _tune(saved="{n: p for n, p in model.named_parameters() if p.requires_grad}"), "not_copied"),
        Mutant("detached, not copied", _tune(saved="{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}"), "not_copied"),
        Mutant("the whole model saved", _tune(saved="{n: p.clone() for n, p in model.state_dict().items()}"), "saved_everything"),
        Mutant("everything thaws", _tune(head="model.requires_grad_(True)"), "base_trains"),
    ],
    "10.6": [
        Mutant("named, not repaired", _ward(repair="W"), "not_repaired"),
        Mutant("back to the base", _ward(repair="W0"), "base_alone"),
        Mutant("repaired without scaling", _ward(repair="W0 + B @ A"), "repair_unscaled"),
        Mutant("merged again", _ward(repair="W + D"), "on_top"),
        Mutant("from what was found", _ward(repair="W - (k - 1) * D if rest < 0.3 else right"), "repaired_from_W"),
        Mutant("k alone", _ward("word = {{0: 'no effect', 1: 'healthy', 2: 'merged twice'}}.get(round(k), 'other base') if abs(k - 0.6) > 0.1 else 'scaling'"),
               "rest_not_looked_at"),
        Mutant("rounds k", _ward("word = {{0: 'no effect', 1: 'healthy', 2: 'merged twice'}}[round(k)] if rest < 0.3 else {else}"), "scaling_missed"),
        Mutant("no such multiple", _ward("word = ({multiple} if abs(k - round(k)) < 0.2 else 'other base') if rest < 0.3 else {else}"),
               "scaling_is_a_multiple"),
        Mutant("forgets the transpose", _ward("word = {multiple} if rest < 0.3 else 'other base'"), "transpose_missed"),
        Mutant("not less than once",
               _ward("word = ('no effect' if k < 0.3 else 'scaling' if k < 0.8 else 'healthy') if rest < 0.3 else {else}"), "twice_missed"),
        Mutant("to the last bit", _ward("word = 'healthy' if torch.equal(W, right) else 'no effect' if torch.equal(W, W0) else 'other base'"), "exact"),
        Mutant("all well", _ward("word = 'healthy'"), "always_the_same"),
        Mutant("other words", _ward("word = ({multiple} if rest < 0.3 else {else}).replace(' ', '_')"), "unknown_word"),
        Mutant("the cause alone", _ward().replace("return word, right", "return word"), "no_repair"),
        Mutant("the other way round", _ward().replace("return word, right", "return right, word"), "swapped"),
    ],
}

ALTERNATIVES = {
    "10.1": [
        _apart(_RIGHT),
        "def apart(model, base, x):\n    import copy\n    m, b = copy.deepcopy(model).eval(), copy.deepcopy(base).eval()\n"
        "    y, z = m(x).detach(), b(x).detach()\n    return ((y - z).abs().amax() / z.abs().amax()).item()\n",
        "def apart(model, base, x):\n    out = []\n    for m in (model, base):\n        was = m.training\n        m.eval()\n        out.append(m(x))\n"
        "        m.train(was)\n    return torch.linalg.vector_norm(out[0] - out[1], float('inf')) / out[1].abs().max()\n",
    ],
    "10.2": [
        _who(),
        "def who_learns(model, x, y):\n    import copy\n    twin = copy.deepcopy(model)\n    for p in twin.parameters():\n        p.grad = None\n"
        "    F.mse_loss(twin(x), y).backward()\n    out = {}\n    for name, p in twin.named_parameters():\n        if not p.requires_grad:\n"
        "            out[name] = 'frozen'\n        elif p.grad is None:\n            out[name] = 'none'\n        else:\n"
        "            out[name] = 'moves' if p.grad.norm() > 0 else 'zero'\n    return out\n",
    ],
    "10.3": [
        _flat(_T, _N, _Z, _O),
        _flat(_Z, _T, _N, _O),
        'def why_flat(c):\n    if c["adapted"] != c["wanted"]:\n        return "targets"\n    if c["A"] + c["B"] == 0:\n        return "both zero"\n'
        '    if c["grad_B"] is None:\n        return "no gradient"\n    return "healthy" if c["B_moved"] > 0 else "optimizer"\n',
    ],
    "10.4": [
        _times("((d * D).sum() / D.norm() ** 2).item()"),
        _times("torch.linalg.lstsq(D.reshape(-1, 1), d.reshape(-1, 1)).solution.item()"),
        _times("torch.trace(d.T @ D) / torch.trace(D.T @ D)"),
    ],
    "10.5": [
        _tune(),
        _tune(saved="{n: p.detach().clone() for n, p in model.state_dict().items() if 'lora_' in n or n.startswith('head')}"),
        _tune(put="apply_lora(model, r=3, alpha=6, target_modules=targets, modules_to_save=['head'])", head="pass"),
        _tune(early="from lora_lab import LoRALinear", put="model.requires_grad_(False); "
              "[setattr(model, n, LoRALinear(getattr(model, n), 3, 6)) for n in targets]"),
    ],
    "10.6": [
        _ward(),
        "def discharge(W, W0, A, B, scaling):\n    U = B @ A\n    D = scaling * U\n"
        "    known = {'healthy': D, 'no effect': 0 * D, 'merged twice': 2 * D, 'scaling': U, 'transposed': D.T}\n"
        "    off = {word: float((W - W0 - part).norm()) for word, part in known.items()}\n    word = min(off, key=off.get)\n"
        "    return (word if off[word] < 0.2 * float(D.norm()) else 'other base'), D.add(W0)\n",
        "def discharge(W, W0, A, B, scaling):\n    D = scaling * B @ A\n    d = (W - W0).flatten()\n"
        "    X = torch.stack([D.flatten(), D.T.flatten()], 1)\n    k, t = torch.linalg.lstsq(X, d[:, None]).solution.flatten().tolist()\n"
        "    rest = (d - X @ torch.tensor([k, t], dtype=X.dtype)).norm() / D.norm()\n    if rest > 0.3:\n        word = 'other base'\n"
        "    elif t > 0.5:\n        word = 'transposed'\n    elif k < 0.3:\n        word = 'no effect'\n    elif k > 1.5:\n        word = 'merged twice'\n"
        "    else:\n        word = 'healthy' if k > 0.8 else 'scaling'\n    return word, W0 + D\n",
    ],
}
