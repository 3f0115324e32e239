"""Wrong and right answers for lab 12: norms of columns, a scaling forgotten in the residual, frozen factors counted, races without a correction."""

from . import Mutant


def _dora(weight: str, V: str = "W0 + scaling * B @ A") -> str:
    return f"def dora_weight(W0, A, B, m, scaling):\n    V = {V}\n    return {weight}\n"


def _pissa(A: str = "root[:, None] * Vh[:r]", B: str = "U[:, :r] * root", residual: str = "W0 - scaling * B @ A", root: str = "(S[:r] / scaling).sqrt()",
           result: str = "A, B, residual") -> str:  # fmt: skip
    return f"""
def pissa_start(W0, r, scaling):
    U, S, Vh = torch.linalg.svd(W0, full_matrices=False)
    root = {root}
    A = {A}
    B = {B}
    residual = {residual}
    return {result}
"""


_PARTS = {  # fixed part, part for each r
    "lora": ("0", "both"), "lora-fa": ("0", "outs"), "dora": ("outs", "both"), "adalora": ("0", "both + L"), "vera": ("outs", "L"),
}  # fmt: skip


def _rank(solve: str = "max(0, (budget - fixed) // each)", core: str = "math.isqrt(budget // L)", layers: str = "shapes", first: str = "", **parts) -> str:
    """parts: method (with _ for -) -> (fixed, each)"""
    table = _PARTS | {name.replace("_", "-"): part for name, part in parts.items()}
    rows = "".join(f"        {name!r}: ({fixed}, {each}),\n" for name, (fixed, each) in table.items())
    return f"""
def rank_for_budget(method, shapes, budget):
    shapes = {layers}
    L, ins, outs = len(shapes), sum(i for o, i in shapes), sum(o for o, i in shapes)
    both = ins + outs
    {first or "pass"}
    if method == "lora-xs":
        return {core}
    fixed, each = {{
{rows}    }}[method]
    return {solve}
"""


def _search(test: str, result: str = "r", start: int = 0) -> str:
    return f"""
def rank_for_budget(method, shapes, budget):
    def count(r):
        n = 0
        for o, i in shapes:
            n += {{"lora": r * (o + i), "lora-fa": r * o, "dora": r * (o + i) + o, "adalora": r * (o + i) + r, "vera": o + r, "lora-xs": r * r}}[method]
        return n
    r = {start}
    while {test}:
        r += 1
    return {result}
"""


def _who(t: str = "d.mean() / (d.std() / len(d) ** 0.5)", loop: str = "", diff: str = "v - scores['LoRA']") -> str:
    loop = loop or """
    for k, name in zip(range(len(t), 0, -1), sorted(t, key=lambda n: -abs(t[n]))):
        if abs(t[name]) <= limits[k]:
            break
        words[name] = "better" if t[name] > 0 else "worse"
"""
    return f"""
def who_beats_lora(scores, limits):
    t = {{}}
    for name, v in scores.items():
        if name == "LoRA":
            continue
        d = {diff}
        t[name] = float({t})
    words = {{name: "open" for name in t}}
{loop}
    return words
"""


def _all_against(limit: str) -> str:
    return f"""
    for name in t:
        if abs(t[name]) > {limit}:
            words[name] = "better" if t[name] > 0 else "worse"
"""


def _holm(order: str = "sorted(t, key=lambda n: -abs(t[n]))", limit: str = "limits[len(t) - j]", fail: str = "break", size: str = "abs(t[name])",
          word: str = '"better" if t[name] > 0 else "worse"') -> str:  # fmt: skip
    return f"""
    for j, name in enumerate({order}):
        if {size} <= {limit}:
            {fail}
        else:
            words[name] = {word}
"""


def _heap(body: str) -> str:
    return "def ranks_by_energy(spectra, share):\n" + "".join(f"    {row}\n" for row in body.strip().splitlines())


def _cut(power: str = "values ** 2", needed: str = "int((held < share * held[-1]).sum()) + 1", values: str = "torch.cat(spectra)", descending: str = "True",
         result: str = "ranks") -> str:  # fmt: skip
    return _heap(f"""
values = {values}
layer = torch.tensor([k for k, S in enumerate(spectra) for _ in S])
order = values.argsort(descending={descending})
held = ({power})[order].cumsum(0)
needed = {needed}
ranks = [int((layer[order[:needed]] == k).sum()) for k in range(len(spectra))]
return {result}
""")


MUTANTS = {
    "12.1": [
        Mutant("norms of the columns", _dora("m[:, None] * V / V.norm(dim=0).detach()"), "columns"),
        Mutant("one norm", _dora("m[:, None] * V / V.norm().detach()"), "whole_matrix"),
        Mutant("norms of W0", _dora("m[:, None] * V / W0.norm(dim=1, keepdim=True)"), "norm_of_W0"),
        Mutant("no norm", _dora("m[:, None] * V"), "norm_missing"),
        Mutant("no m", _dora("V / V.norm(dim=1, keepdim=True)"), "m_missing"),
        Mutant("no root", _dora("m[:, None] * V / (V**2).sum(1, keepdim=True)"), "norm_squared"),
        Mutant("p=1", _dora("m[:, None] * V / V.norm(p=1, dim=1, keepdim=True)"), "norm_absolute"),
        Mutant("no scaling", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True)", "W0 + B @ A"), "scaling_missing"),
        Mutant("the scaling around all", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True)", "scaling * (W0 + B @ A)"), "scaling_missing"),
        Mutant("the ratio at the update", _dora("W0 + m[:, None] / V.norm(dim=1, keepdim=True) * (scaling * B @ A)"), "update_only"),
        Mutant("the direction of W0", _dora("m[:, None] * W0 / W0.norm(dim=1, keepdim=True) + scaling * B @ A"), "norm_of_W0_and_base_only"),
        Mutant("the direction of the update", _dora("W0 + m[:, None] * V / V.norm(dim=1, keepdim=True)", "scaling * B @ A"), "direction_of_the_update"),
        Mutant("added to W0", _dora("W0 + m[:, None] * V / V.norm(dim=1, keepdim=True)"), "added_to_W0"),
        Mutant("m and norms across", _dora("m * V / V.norm(dim=1)"), "norm_across_and_m_across"),
        Mutant("m across", _dora("m * V / V.norm(dim=1, keepdim=True)"), "m_across"),
        Mutant("F.normalize as it comes, dim=0", _dora("m[:, None] * F.normalize(V, dim=0)"), "columns"),
        Mutant("F.normalize: the norm trains", _dora("m[:, None] * F.normalize(V, dim=1)"), "norm_not_detached"),
        Mutant("not detached", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True)"), "norm_not_detached"),
        Mutant("V detached", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True)", "(W0 + scaling * B @ A).detach()"), "direction_detached"),
        Mutant("no_grad", "def dora_weight(W0, A, B, m, scaling):\n    with torch.no_grad():\n        V = W0 + scaling * B @ A\n"
               "        return m[:, None] * V / V.norm(dim=1, keepdim=True)\n", "all_detached"),
        Mutant("divided by r once more", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True).detach()", "W0 + scaling / len(A) * B @ A"), "divided_by_r"),
        Mutant("the change", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True).detach() - W0"), "minus_W0"),
        Mutant("A @ B", _dora("m[:, None] * V / V.norm(dim=1, keepdim=True)", "W0 + scaling * A @ B"), "order"),
    ],
    "12.2": [
        Mutant("the scaling nowhere", _pissa(root="S[:r].sqrt()", residual="W0 - B @ A"), "scaling_forgotten"),
        Mutant("the scaling in the residual alone", _pissa(root="S[:r].sqrt()"), "unscaled_factors"),
        Mutant("the scaling in the factors alone", _pissa(residual="W0 - B @ A"), "residual_unscaled"),
        Mutant("the scaling outside the root", _pissa(root="S[:r].sqrt() / scaling"), "scaling_outside_root"),
        Mutant("times the scaling", _pissa(root="(S[:r] * scaling).sqrt()"), "scaling_times_in_root"),
        Mutant("no root", _pissa(root="S[:r] / scaling"), "no_root"),
        Mutant("no S", _pissa(A="Vh[:r]", B="U[:, :r]"), "S_missing"),
        Mutant("S in B", _pissa(A="Vh[:r]", B="U[:, :r] * S[:r] / scaling"), "all_in_B"),
        Mutant("S in A", _pissa(A="S[:r, None] * Vh[:r]", B="U[:, :r] / scaling"), "S_in_A"),
        Mutant("W0 stays", _pissa(residual="W0"), "residual_is_W0"),
        Mutant("the part stays", _pissa(residual="scaling * B @ A"), "residual_is_part"),
        Mutant("the last ones", _pissa(A="root[:, None] * Vh[-r:]", B="U[:, -r:] * root", root="(S[-r:] / scaling).sqrt()"), "last_directions"),
        Mutant("V as svd gives it, not transposed", _pissa(A="root[:, None] * Vh[:, :r].T"), "columns_of_Vh"),
        Mutant("LoRA's start", _pissa(A="torch.randn(r, W0.shape[1], dtype=W0.dtype)", B="torch.zeros(len(W0), r, dtype=W0.dtype)"), "lora_start"),
        Mutant("B first", _pissa(result="B, A, residual"), "swapped"),
        Mutant("transposed", _pissa(result="A.T, B.T, residual"), "transposed"),
        Mutant("no residual", _pissa(result="A, B"), "two_values"),
        Mutant("QR", "def pissa_start(W0, r, scaling):\n    Q, R = torch.linalg.qr(W0)\n    A, B = R[:r] / scaling**0.5, Q[:, :r] / scaling**0.5\n"
               "    return A, B, W0 - scaling * B @ A\n", "qr"),
        Mutant("W0 changed in place", _pissa(residual="W0.sub_(scaling * B @ A)"), "changes_input"),
    ],
    "12.3": [
        Mutant("LoRA-FA as LoRA", _rank(lora_fa=("0", "both")), "fa_as_lora"),
        Mutant("LoRA-FA freezes B", _rank(lora_fa=("0", "ins")), "fa_wrong_factor"),
        Mutant("LoRA counts B alone", _rank(lora=("0", "outs")), "lora_out_only"),
        Mutant("square layers", _rank(lora=("0", "2 * ins")), "lora_square"),
        Mutant("DoRA as LoRA", _rank(dora=("0", "both")), "magnitude_missing"),
        Mutant("magnitudes for inputs", _rank(dora=("ins", "both")), "magnitude_per_input"),
        Mutant("magnitudes for each r", _rank(dora=("0", "both + outs")), "magnitude_per_rank"),
        Mutant("AdaLoRA as LoRA", _rank(adalora=("0", "both")), "values_missing"),
        Mutant("λ once", _rank(adalora=("0", "both + 1")), "values_once"),
        Mutant("VeRA's shared matrices counted", _rank(vera=("outs", "L + max(o for o, _ in shapes) + max(i for _, i in shapes)")), "vera_shared_counted"),
        Mutant("VeRA's b has in numbers", _rank(vera=("ins", "L")), "vera_in"),
        Mutant("VeRA's d once", _rank(vera=("outs", "1")), "vera_vectors_shared"),
        Mutant("VeRA as LoRA", _rank(vera=("0", "both")), "vera_as_lora"),
        Mutant("R once", _rank(core="math.isqrt(budget)"), "core_shared"),
        Mutant("R diagonal", _rank(core="budget // L"), "core_diagonal"),
        Mutant("below 0", _rank("(budget - fixed) // each"), "negative"),
        Mutant("at least 1", _rank("max(1, (budget - fixed) // each)", "max(1, math.isqrt(budget // L))"), "at_least_one"),
        Mutant("rounds", _rank("max(0, round((budget - fixed) / each))", "round((budget / L) ** 0.5)"), "rounded"),
        Mutant("not whole", _rank("(budget - fixed) / each", "(budget / L) ** 0.5"), "not_whole"),
        Mutant("the first layer", _rank(layers="shapes[:1]"), "first_layer"),
        Mutant("all as large as the first", _rank(layers="shapes[:1] * len(shapes)"), "first_times_layers"),
        Mutant("raises", _rank(first="if method in ('dora', 'vera') and budget < outs: raise ValueError('too little')"), "raises"),
        Mutant("None", _rank(first="if method in ('dora', 'vera') and budget < outs: return None"), "none_for_zero"),
        Mutant("in and out swapped", _rank(layers="[(i, o) for o, i in shapes]"), "shapes_swapped"),
        Mutant("an equal part for each layer", """
def rank_for_budget(method, shapes, budget):
    part, ranks = budget // len(shapes), []
    for o, i in shapes:
        ranks.append({"lora": part // (o + i), "lora-fa": part // o, "dora": (part - o) // (o + i), "adalora": part // (o + i + 1), "vera": part - o,
                      "lora-xs": math.isqrt(part)}[method])
    return max(0, min(ranks))
""", "largest_times_layers"),
        Mutant("the first too large", _search("count(r) <= budget", start=1), "first_too_large"),
        Mutant("a search that goes too far", _search("count(r) <= budget"), "too_large"),
        Mutant("a search with <", _search("count(r + 1) < budget"), "strict"),
        Mutant("a search from 1", _search("count(r + 1) <= budget", start=1), "at_least_one"),
    ],
    "12.4": [
        Mutant("alone", _who(loop=_all_against("limits[1]")), "uncorrected"),
        Mutant("Bonferroni", _who(loop=_all_against("limits[len(t)]")), "bonferroni"),
        Mutant("goes on", _who(loop=_holm(fail="continue")), "no_stop"),
        Mutant("smallest first", _who(loop=_holm(order="sorted(t, key=lambda n: abs(t[n]))")), "smallest_first"),
        Mutant("Hochberg", _who(loop="""
    for j, name in enumerate(sorted(t, key=lambda n: abs(t[n]))):
        if abs(t[name]) > limits[j + 1]:
            for other in t:
                if abs(t[other]) >= abs(t[name]):
                    words[other] = "better" if t[other] > 0 else "worse"
            break
"""), "hochberg"),
        Mutant("sorted by t", _who(loop=_holm(order="sorted(t, key=t.get, reverse=True)")), "signed_order"),
        Mutant("only better", _who(loop=_holm(order="sorted(t, key=t.get, reverse=True)", size="t[name]")), "one_sided"),
        Mutant("LoRA is one of them", _who(loop=_holm(limit="limits[len(scores) - j]")), "lora_counted"),
        Mutant("off by one", _who(loop=_holm(limit="limits[max(len(t) - j - 1, 0)]")), "off_by_one"),
        Mutant("limits from the front", _who(loop=_holm(limit="limits[j + 1]")), "limits_upside_down"),
        Mutant("in the order given", _who(loop=_holm(order="t")), "in_order_given"),
        Mutant("the mean's sign", _who(loop='    for name in t:\n        words[name] = "better" if t[name] > 0 else "worse"\n'), "sign_alone"),
        Mutant("unpaired", _who("(v.mean() - scores['LoRA'].mean()) / (v.var() / len(v) + scores['LoRA'].var() / len(v)) ** 0.5"), "unpaired"),
        Mutant("by n", _who("d.mean() / (d.std(correction=0) / len(d) ** 0.5)"), "by_n"),
        Mutant("no √n", _who("d.mean() / d.std()"), "root_missing"),
        Mutant("n for √n", _who("d.mean() / (d.std() / len(d))"), "by_n_not_root"),
        Mutant("variance", _who("d.mean() / (d.var() / len(d))"), "variance"),
        Mutant("wrong way round", _who(diff="scores['LoRA'] - v"), "reversed"),
        Mutant("two errors added", _who("(v.mean() - scores['LoRA'].mean()) / ((v.std() + scores['LoRA'].std()) / len(v) ** 0.5)"), "errors_added"),
        Mutant("√(n − 1)", _who("d.mean() / (d.std() / (len(d) - 1) ** 0.5)"), "root_n_minus_1"),
        Mutant("Bonferroni, with LoRA", _who(loop=_all_against("limits[len(scores)]")), "bonferroni_lora_counted"),
        Mutant("capital letters", _who().replace("return words", "return {n: w.capitalize() for n, w in words.items()}"), "other_letters"),
        Mutant("unpaired and alone", _who("(v.mean() - scores['LoRA'].mean()) / (v.var() / len(v) + scores['LoRA'].var() / len(v)) ** 0.5",
                                          _all_against("limits[1]")), "unpaired_and_uncorrected"),
        Mutant("the winners", _who().replace("return words", "return [name for name in words if words[name] == 'better']"), "a_list"),
        Mutant("open ones left out", _who().replace("return words", "return {n: w for n, w in words.items() if w != 'open'}"), "open_left_out"),
    ],
    "12.5": [
        Mutant("layer by layer", _heap("return [int((((S**2).cumsum(0) / (S**2).sum()) < share).sum()) + 1 for S in spectra]"), "per_layer"),
        Mutant("s", _cut("values"), "not_squared"),
        Mutant("each layer divided by its own", _cut(values="torch.cat([S / (S**2).sum().sqrt().clamp(min=1e-30) for S in spectra])"), "normalised"),
        Mutant("one fewer", _cut(needed="int((held < share * held[-1]).sum())"), "one_too_few"),
        Mutant("one more", _cut(needed="int((held < share * held[-1]).sum()) + 2"), "one_too_many"),
        Mutant("at least 1", _cut(result="[max(1, r) for r in ranks]"), "at_least_one"),
        Mutant("share is dropped", _cut(needed="int((held < (1 - share) * held[-1]).sum()) + 1"), "complement"),
        Mutant("what is dropped", _cut(result="[len(S) - r for S, r in zip(spectra, ranks)]"), "dropped"),
        Mutant("the norm", _cut(needed="int((held.sqrt() < share * held[-1].sqrt()).sum()) + 1"), "norm_share"),
        Mutant("ascending", _cut(descending="False"), "smallest_first"),
        Mutant("a share of the largest", _heap("top = max(S[0] for S in spectra)\nreturn [int((S > share * top).sum()) for S in spectra]"),
               "above_share_of_largest"),
        Mutant("a share of the directions", _cut(needed="int(share * len(values))"), "share_of_directions_down"),
        Mutant("the same everywhere", _heap("""
total = sum((S**2).sum() for S in spectra)
r = 0
while sum((S[:r] ** 2).sum() for S in spectra) < share * total:
    r += 1
return [min(r, len(S)) for S in spectra]
"""), "same_everywhere"),
        Mutant("how many in all", _cut(result="needed"), "one_number"),
        Mutant("a threshold", _heap("""
v = torch.cat(spectra).sort(descending=True).values
held = (v**2).cumsum(0)
limit = v[int((held < share * held[-1]).sum())]
return [int((S >= limit).sum()) for S in spectra]
"""), "ties"),
    ],
}

ALTERNATIVES = {
    "12.1": [
        _dora("V * (m / V.detach().norm(dim=1)).unsqueeze(1)"),
        _dora("torch.diag(m / torch.linalg.norm(V.detach(), axis=1)) @ V", "torch.addmm(W0, B, A, alpha=scaling)"),
        "def dora_weight(W0, A, B, m, scaling):\n    V = W0 + B @ A * scaling\n    with torch.no_grad():\n        n = (V * V).sum(-1).sqrt()\n"
        "    return torch.stack([m[i] * V[i] / n[i] for i in range(len(V))])\n",
    ],
    "12.2": [
        _pissa(),
        "def pissa_start(W0, r, scaling):\n    U, S, V = torch.svd(W0)\n    root = torch.diag(S[:r]).sqrt() / scaling**0.5\n"
        "    A, B = root @ V[:, :r].T, U[:, :r] @ root\n    return A, B, W0 - scaling * (B @ A)\n",
        "def pissa_start(W0, r, scaling):\n    U, S, Vh = torch.linalg.svd(W0)\n    k = min(W0.shape)\n    root = (S[:r] / scaling) ** 0.5\n"
        "    return -root[:, None] * Vh[:r], -U[:, :r] * root, (U[:, r:k] * S[r:]) @ Vh[r:k]\n",
    ],
    "12.3": [_rank(), _search("count(r + 1) <= budget")],
    "12.4": [
        _who(),
        _who(loop=_holm()),
        """
def who_beats_lora(scores, limits):
    names = [name for name in scores if name != "LoRA"]
    d = torch.stack([scores[name] for name in names]) - scores["LoRA"]
    t = d.mean(1) / d.std(1) * d.shape[1] ** 0.5
    order = t.abs().argsort(descending=True)
    passed = (t.abs()[order] > limits[1 : len(names) + 1].flip(0)).cumprod(0).bool()
    words = {}
    for i, ok in zip(order.tolist(), passed.tolist()):
        words[names[i]] = ("better" if t[i] > 0 else "worse") if ok else "open"
    return words
""",
    ],
    "12.5": [
        _cut(),
        """
def ranks_by_energy(spectra, share):
    import heapq
    goal, held, ranks = share * sum(float((S**2).sum()) for S in spectra), 0.0, [0] * len(spectra)
    heap = [(-float(S[0]), k) for k, S in enumerate(spectra)]
    heapq.heapify(heap)
    while held < goal:
        s, k = heapq.heappop(heap)
        held, ranks[k] = held + s * s, ranks[k] + 1
        if ranks[k] < len(spectra[k]):
            heapq.heappush(heap, (-float(spectra[k][ranks[k]]), k))
    return ranks
""",
        """
def ranks_by_energy(spectra, share):
    heap = sorted(((s.item() ** 2, k) for k, S in enumerate(spectra) for s in S), reverse=True)
    total, held, ranks = sum(e for e, _ in heap), 0, torch.zeros(len(spectra), dtype=torch.long)
    for e, k in heap:
        if held >= share * total:
            break
        held += e
        ranks[k] += 1
    return ranks
""",
    ],
}
