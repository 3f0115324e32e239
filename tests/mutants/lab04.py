"""Lab 04: wrong counts that people publish, and right ones in another style."""

from . import Mutant


def _added(expression: str) -> str:
    return f"def added_parameters(d_in, d_out, r, of=1, chosen=1):\n    width = d_out // of\n    return {expression}\n"


def _rank(expression: str, head: str = "head[0] * head[1] + head[1]", total: str = "sum(i + o for i, o in shapes)") -> str:
    return f"""
def largest_rank(shapes, budget, head=None):
    left = budget - ({head} if head else 0)
    total = {total}
    return {expression}
"""


def _bytes(weights="frozen + trained", gradients="trained", copies='{"adam": 2, "momentum": 1, "sgd": 0}[optimizer]', of="trained",
           result="width * weights, width * gradients, width * state") -> str:  # fmt: skip
    return f"""
def training_bytes(frozen, trained, width, optimizer):
    weights, gradients, state = {weights}, {gradients}, {copies} * ({of})
    return {result}
"""


def _kept(full="d_in", lora="d_in + r", frozen="0", gelu="learns and place < len(layers) - 1", result="kept * tokens") -> str:
    return f"""
def kept_numbers(layers, tokens, r):
    kept, learns = 0, False
    for place, (d_in, d_out, kind) in enumerate(layers):
        before = learns
        learns = learns or kind != "frozen"
        if kind == "full":
            kept += {full}
        elif kind == "lora":
            kept += {lora}
        else:
            kept += {frozen}
        if {gelu}:
            kept += d_out
    return {result}
"""


def _wrong(test: str, count="2 * layers * matrices * d_model * r / 1e6", append="name") -> str:
    return f"""
def misprints(rows, layers, d_model):
    wrong = []
    for name, matrices, r, printed, decimals in rows:
        count = {count}
        if {test}:
            wrong.append({append})
    return wrong
"""


_DIFFERS = "round(count, decimals) != printed"

MUTANTS = {
    "4.1": [
        Mutant("2 r d, as for square layers", _added("chosen * r * 2 * d_in"), "square"),
        Mutant("2 r d with the outputs", _added("chosen * r * 2 * width"), "square_out"),
        Mutant("r times the matrix", _added("chosen * r * d_in * width"), "full_matrix"),
        Mutant("one adapter on the fused layer", _added("r * (d_in + d_out)"), "one_adapter"),
        Mutant("each B as wide as the layer", _added("chosen * r * (d_in + d_out)"), "whole_width"),
        Mutant("all slices", _added("of * r * (d_in + width)"), "all_slices"),
        Mutant("one slice", _added("r * (d_in + width)"), "one_slice"),
        Mutant("A shared", _added("r * (d_in + chosen * width)"), "shared_A"),
        Mutant("r forgotten", _added("chosen * (d_in + width)"), "rank_missing"),
        Mutant("A times B", _added("chosen * (r * d_in) * (r * width)"), "full_matrix_and_rank_squared"),
        Mutant("with W", _added("d_in * d_out + chosen * r * (d_in + width)"), "with_base"),
        Mutant("nn.Linear with its bias", _added(
            "chosen * sum(p.numel() for m in (nn.Linear(d_in, r), nn.Linear(r, width)) for p in m.parameters())"), "with_biases"),
        Mutant("the inputs cut as well", _added("chosen * r * (d_in // of + width) if of == 1 else chosen * r * (d_in / of + width)"), "input_cut_too"),
        Mutant("both counts", _added("(chosen * r * d_in, chosen * r * width)"), "two_counts"),
        Mutant("A alone", _added("chosen * r * d_in"), "only_A"),
        Mutant("with alpha", _added("chosen * (r * (d_in + width) + 1)"), "with_alpha"),
    ],
    "4.2": [
        Mutant("rounds", _rank("max(0, round(left / total))"), "rounded"),
        Mutant("rounds up", _rank("max(0, math.ceil(left / total))"), "ceil"),
        Mutant("less than, not at most", _rank("max(0, (left - 1) // total)"), "one_less"),
        Mutant("no rounding", _rank("max(0, left / total)"), "not_rounded"),
        Mutant("at least 1", _rank("max(1, left // total)"), "capped_at_1"),
        Mutant("below zero", _rank("left // total"), "negative"),
        Mutant("the head forgotten", _rank("max(0, left // total)", head="0"), "head_forgotten"),
        Mutant("the head's bias forgotten", _rank("max(0, left // total)", head="head[0] * head[1]"), "head_bias_forgotten"),
        Mutant("an adapter on the head", _rank("budget // (total + (sum(head) if head else 0))"), "lora_on_head"),
        Mutant("the mean layer", _rank("max(0, left * len(shapes) // total)"), "mean"),
        Mutant("the first layer", _rank("max(0, left // total)", total="sum(shapes[0])"), "first_only"),
        Mutant("A alone", _rank("max(0, left // total)", total="sum(i for i, o in shapes)"), "only_in"),
        Mutant("square layers", _rank("max(0, left // total)", total="sum(2 * i for i, o in shapes)"), "square"),
        Mutant("one rank too many", """
def largest_rank(shapes, budget, head=None):
    spent, r = (head[0] * head[1] + head[1] if head else 0), 1
    while spent + r * sum(i + o for i, o in shapes) <= budget:
        r += 1
    return r
""", "one_more"),
        Mutant("no head thought of", "def largest_rank(shapes, budget, head=None):\n    d, classes = head[0], head[1]\n"
               "    return (budget - d * classes - classes) // sum(i + o for i, o in shapes)\n", "no_head"),
        Mutant("the head added", _rank("max(0, left // total)", head="-head[0] * head[1] - head[1]"), "head_added"),
        Mutant("a rank for each", "def largest_rank(shapes, budget, head=None):\n    return [budget // (i + o) for i, o in shapes]\n", "one_each"),
        Mutant("divides by the matrices", _rank("max(0, left // total)", total="sum(i * o for i, o in shapes)"), "full_matrix"),
    ],
    "4.3": [
        Mutant("only the adapter is in memory", _bytes(weights="trained"), "base_forgotten"),
        Mutant("the adapter's weights forgotten", _bytes(weights="frozen"), "adapter_forgotten"),
        Mutant("gradients for all", _bytes(gradients="frozen + trained"), "gradients_for_all"),
        Mutant("Adam for all", _bytes(of="frozen + trained"), "state_for_all"),
        Mutant("gradients and Adam for all", _bytes(gradients="frozen + trained", of="frozen + trained"), "gradients_for_all_and_state_for_all"),
        Mutant("one moment", _bytes(copies='{"adam": 1, "momentum": 1, "sgd": 0}[optimizer]'), "one_moment"),
        Mutant("a master copy", _bytes(copies='{"adam": 3, "momentum": 1, "sgd": 0}[optimizer]'), "three_copies"),
        Mutant("always Adam", _bytes(copies="2"), "always_adam"),
        Mutant("sgd keeps one", _bytes(copies='{"adam": 2, "momentum": 1, "sgd": 1}[optimizer]'), "sgd_keeps_one"),
        Mutant("momentum keeps none", _bytes(copies='{"adam": 2, "momentum": 0, "sgd": 0}[optimizer]'), "momentum_forgotten"),
        Mutant("numbers", _bytes(result="weights, gradients, state"), "numbers_not_bytes"),
        Mutant("bits", _bytes(result="8 * width * weights, 8 * width * gradients, 8 * width * state"), "bits"),
        Mutant("the state in float32", _bytes(result="width * weights, width * gradients, 4 * state"), "state_in_fp32"),
        Mutant("4 bytes", _bytes(result="4 * weights, 4 * gradients, 4 * state"), "always_four"),
        Mutant("the sum", _bytes(result="width * (weights + gradients + state)"), "one_number"),
        Mutant("Adam with a capital", _bytes(copies='(2 if optimizer == "Adam" else optimizer == "momentum")'), "adam_forgotten"),
        Mutant("gradients and state in float32", _bytes(result="width * weights, 4 * gradients, 4 * state"), "only_weights_narrow"),
        Mutant("a dict", _bytes(result="dict(weights=width * weights, gradients=width * gradients, state=width * state)"), "a_dict"),
        Mutant("another order", _bytes(result="width * gradients, width * state, width * weights"), "order"),
    ],
    "4.4": [
        Mutant("GELU forgotten", _kept(gelu="False"), "gelu_forgotten"),
        Mutant("GELU everywhere", _kept(gelu="place < len(layers) - 1"), "gelu_everywhere"),
        Mutant("GELU after what trains", _kept(gelu='kind != "frozen" and place < len(layers) - 1'), "gelu_own"),
        Mutant("a GELU at the end", _kept(gelu="learns"), "gelu_last"),
        Mutant("one GELU late", _kept(gelu="before and place < len(layers) - 1"), "gelu_after_first"),
        Mutant("LoRA keeps r numbers", _kept(lora="r"), "only_Ax"),
        Mutant("A x forgotten", _kept(lora="d_in"), "Ax_forgotten"),
        Mutant("LoRA keeps nothing", _kept(lora="0"), "lora_nothing"),
        Mutant("B A x kept", _kept(lora="d_in + r + d_out"), "BAx_kept"),
        Mutant("frozen layers keep x", _kept(frozen="d_in"), "frozen_input"),
        Mutant("everything is kept", _kept(frozen="d_in", gelu="place < len(layers) - 1"), "frozen_input_and_gelu_everywhere"),
        Mutant("outputs", _kept(full="d_out"), "full_output"),
        Mutant("one token", _kept(result="kept"), "tokens_missing"),
        Mutant("bytes", _kept(result="4 * kept * tokens"), "in_bytes"),
        Mutant("a memory of adapters alone", _kept(lora="r", gelu="False"), "only_Ax_and_gelu_forgotten"),
        Mutant("the parameters instead", _kept(lora="r * (d_in + d_out)"), "size_of_A_and_B"),
        Mutant("frozen layers above keep x", _kept(frozen="d_in * before"), "frozen_input_above"),
        Mutant("GELU after full layers alone", _kept(gelu='place < len(layers) - 1 and "full" in [k for _, _, k in layers[: place + 1]]'),
               "gelu_after_full"),
        Mutant("GELU as wide as the layer's input", _kept().replace("kept += d_out", "kept += d_in"), "gelu_d_in"),
        Mutant("nothing for the first that trains", _kept(full="d_in * before", lora="(d_in + r) * before"), "first_trained_left_out"),
        Mutant("the parameters as well", """
def kept_numbers(layers, tokens, r):
    kept, more, learns = 0, 0, False
    for place, (d_in, d_out, kind) in enumerate(layers):
        learns = learns or kind != "frozen"
        kept += {"full": d_in, "lora": d_in + r, "frozen": 0}[kind]
        more += r * (d_in + d_out) * (kind == "lora")
        if learns and place < len(layers) - 1:
            kept += d_out
    return kept * tokens + more
""", "parameters_too"),
    ],
    "4.5": [
        Mutant("within 1 %", _wrong("abs(count - printed) > 0.01 * printed"), "per_cent"),
        Mutant("within 5 %", _wrong("abs(count / printed - 1) > 0.05"), "five_per_cent"),
        Mutant("math.isclose", _wrong("not math.isclose(count, printed)"), "exactly"),
        Mutant("cuts digits off", _wrong("math.floor(count * 10**decimals) != round(printed * 10**decimals)"), "cut"),
        Mutant("those that follow", _wrong("round(count, decimals) == printed"), "inverted"),
        Mutant("A alone", _wrong(_DIFFERS, count="layers * matrices * d_model * r / 1e6"), "only_A"),
        Mutant("one layer", _wrong(_DIFFERS, count="2 * matrices * d_model * r / 1e6"), "all_rows"),
        Mutant("always q and v", _wrong(_DIFFERS, count="4 * layers * d_model * r / 1e6"), "two_matrices"),
        Mutant("not in millions", _wrong(_DIFFERS, count="2 * layers * matrices * d_model * r"), "all_rows"),
        Mutant("one decimal", _wrong("round(count, 1) != round(printed, 1)"), "one_decimal"),
        Mutant("a whole unit", _wrong("abs(count - printed) > 10**-decimals"), "unit"),
        Mutant("flags", "def misprints(rows, layers, d_model):\n    return [round(2 * layers * m * d_model * r / 1e6, n) != p for _, m, r, p, n in rows]\n",
               "flags"),
        Mutant("a tenth of a million", _wrong("abs(count - printed) > 0.1"), "a_tenth"),
        Mutant("whole millions, cut", _wrong("int(count) != int(printed)"), "whole_cut"),
        Mutant("return inside the loop", _wrong(_DIFFERS).replace("            wrong.append(name)\n", "            return [name]\n"), "first_only"),
        Mutant("rows", _wrong(_DIFFERS, append="[name, matrices, r, printed, decimals]"), "whole_rows"),
    ],
}  # fmt: skip

ALTERNATIVES = {
    "4.1": [
        "def added_parameters(d_in, d_out, r, of=1, chosen=1):\n    A, B = torch.zeros(chosen * r, d_in), torch.zeros(d_out // of * chosen, r)\n"
        "    return A.numel() + B.numel()\n",
        _added("sum(r * d_in + width * r for _ in range(chosen))"),
        _added("float(chosen * r * (d_in + d_out / of))"),
    ],
    "4.2": [
        """
def largest_rank(shapes, budget, head=None):
    def cost(r):
        whole = 0 if head is None else nn.Linear(*head).weight.numel() + head[1]
        return whole + sum(r * (i + o) for i, o in shapes)
    r = 0
    while cost(r + 1) <= budget:
        r += 1
    return r
""",
        _rank("max(0, math.floor(left / total))"),
        _rank("torch.tensor(max(0, left // total))", total="int(np.sum(shapes))"),
    ],
    "4.3": [
        "def training_bytes(frozen, trained, width, optimizer):\n    g = trained * width\n"
        "    return [frozen * width + g, g, {'sgd': 0, 'momentum': g, 'adam': g + g}[optimizer]]\n",
        _bytes(result="torch.tensor([width * weights, width * gradients, width * state])"),
    ],
    "4.4": [
        """
def kept_numbers(layers, tokens, r):
    kinds = [kind for _, _, kind in layers]
    first = next(k for k, kind in enumerate(kinds) if kind != "frozen")
    inputs = sum(i + r * (kind == "lora") for i, _, kind in layers if kind != "frozen")
    gelus = sum(o for _, o, _ in layers[first:-1])
    return tokens * (inputs + gelus)
""",
        """
def kept_numbers(layers, tokens, r):
    learns, last, kept = False, len(layers) - 1, []
    for k, (i, o, kind) in enumerate(layers):
        if kind in ("full", "lora"):
            learns = True
            kept.append(tokens * i)
        if kind == "lora":
            kept.append(tokens * r)
        if learns and k != last:
            kept.append(tokens * o)
    return float(sum(kept))
""",
    ],
    "4.5": [
        _wrong("abs(count - printed) > 0.5 * 10**-decimals"),
        "def misprints(rows, layers, d_model):\n    return tuple(name for name, m, r, p, n in rows "
        "if f'{layers * m * r * 2 * d_model / 1e6:.{n}f}' != f'{p:.{n}f}')\n",
    ],
}
