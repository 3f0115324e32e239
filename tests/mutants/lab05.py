"""Wrong and right answers for lab 05: the Conv1D's layout, heads cut the wrong way, patterns that match too much, stacked factors, budgets."""

from . import Mutant


def _merged(expression: str, before: str = "") -> str:
    return f"def merged_conv1d(weight, A, B, alpha, r):\n    s = alpha / r\n    {before or 'pass'}\n    return {expression}\n"


def _head(expression: str, before: str = "") -> str:
    return (
        "def head_columns(weight, part, head, n_head):\n    d = weight.shape[0]\n    w, p = d // n_head, 'qkv'.index(part)\n"
        f"    {before or 'pass'}\n    return {expression}\n"
    )


def _targets(expression: str, before: str = "") -> str:
    return f"def attention_outputs(blocks):\n    {before or 'pass'}\n    return {expression}\n"


def _pair(A: str, B: str, alpha: str = "2 * alpha") -> str:
    return (
        "def as_one_pair(A_q, B_q, A_v, B_v, alpha):\n    d, r = B_q.shape\n    O, cat = B_q.new_zeros(d, r), torch.cat\n"
        f"    return {A}, {B}, {alpha}\n"
    )


_A, _B = "cat([A_q, A_v])", "cat([cat([B_q, O], 1), cat([O, O], 1), cat([O, B_v], 1)])"


def _rank(expression: str) -> str:
    return f"def largest_rank(budget, shapes, blocks):\n    return {expression}\n"


_IN_OUT = "sum(i + o for i, o in shapes)"

MUTANTS = {
    "5.1": [
        Mutant("as in an nn.Linear", _merged("weight + s * B @ A"), "not_transposed"),
        Mutant("the weight turned instead", _merged("weight.T + s * B @ A"), "weight_transposed"),
        Mutant("turned only where it does not fit", _merged(
            "weight + delta", "delta = s * B @ A; delta = delta if delta.shape == weight.shape else delta.T"), "transposed_where_needed"),
        Mutant("tries first", """
def merged_conv1d(weight, A, B, alpha, r):
    delta = (alpha / r) * (B @ A)
    try:
        return weight + delta
    except RuntimeError:
        return weight + delta.T
""", "transposed_where_needed"),
        Mutant("reshaped", _merged("weight + s * (B @ A).reshape(weight.shape)"), "reshaped"),
        Mutant("view_as", _merged("weight + (s * (B @ A)).view_as(weight)"), "reshaped"),
        Mutant("ΔW alone", _merged("s * (B @ A).T"), "delta_alone"),
        Mutant("minus", _merged("weight - s * (B @ A).T"), "subtracted"),
        Mutant("no scaling", _merged("weight + (B @ A).T"), "scaling"),
        Mutant("alpha alone", _merged("weight + alpha * (B @ A).T"), "scaling"),
        Mutant("upside down", _merged("weight + r / alpha * A.T @ B.T"), "scaling"),
        Mutant("neither turned nor scaled", _merged("weight + B @ A"), "not_transposed_and_scaling"),
        Mutant("scales everything", _merged("s * (weight + (B @ A).T)"), "base_scaled"),
        Mutant("a copy", _merged("weight.clone()"), "unchanged"),
        Mutant("in place", _merged("weight", "weight += s * (B @ A).T"), "changes_input"),
        Mutant("in place, without return", "def merged_conv1d(weight, A, B, alpha, r):\n    weight += (alpha / r) * (B @ A).T\n", "changes_input"),
        Mutant("forgets to return", "def merged_conv1d(weight, A, B, alpha, r):\n    weight + (alpha / r) * (B @ A).T\n", "no_return"),
    ],
    "5.2": [
        Mutant("head by head", _head("weight[:, (3 * head + p) * w : (3 * head + p + 1) * w]"), "head_by_head"),
        Mutant("chunks by head, then by part", _head("weight.chunk(n_head, 1)[head].chunk(3, 1)[p]"), "head_by_head"),
        Mutant("forgets the part", _head("weight[:, head * w : (head + 1) * w]"), "part_ignored"),
        Mutant("the whole part", _head("weight[:, p * d : (p + 1) * d]"), "head_ignored"),
        Mutant("always head 0", _head("weight[:, p * d : p * d + w]"), "first_head"),
        Mutant("every n-th", _head("weight[:, p * d : (p + 1) * d][:, head::n_head]"), "strided"),
        Mutant("(width, heads) for (heads, width)", _head("weight.reshape(d, 3, w, n_head)[:, p, :, head]"), "strided"),
        Mutant("n_head columns", _head("weight[:, p * d + head * n_head : p * d + (head + 1) * n_head]"), "width_is_n_head"),
        Mutant("starts at head times n_head", _head("weight[:, p * d + head * n_head :][:, :w]"), "start_counts_n_head"),
        Mutant("counts heads from 1", _head("weight[:, p * d + (head - 1) * w : p * d + head * w]"), "heads_from_1"),
        Mutant("one head too far", _head("weight[:, p * d + (head + 1) * w : p * d + (head + 2) * w]"), "next_head"),
        Mutant("no end", _head("weight[:, p * d + head * w :]"), "to_the_end"),
        Mutant("rows", _head("weight[head * w : (head + 1) * w]"), "rows"),
        Mutant("rows of all three parts", _head("weight[p * d + head * w : p * d + (head + 1) * w]"), "rows"),
        Mutant("as nn.Linear keeps it", _head("weight.T[p * d + head * w : p * d + (head + 1) * w]"), "as_linear"),
        Mutant("reshapes the rows", _head("weight.reshape(3, n_head, w, d)[p, head]"), "reshaped_rows"),
        Mutant("reshapes the rows and turns", _head("weight.reshape(3, n_head, w, d)[p, head].T"), "reshaped_rows"),
        Mutant("v, k, q", _head("weight[:, 'vkq'.index(part) * d + head * w :][:, :w]"), "order"),
        Mutant("k, q, v", _head("weight[:, 'kqv'.index(part) * d + head * w :][:, :w]"), "order"),
        Mutant("d from the columns", _head("weight[:, p * d + head * (d // n_head) :][:, : d // n_head]", "d = weight.shape[1]"), "d_is_the_width"),
        Mutant("the end counted in", _head("weight[:, p * d + head * w : p * d + (head + 1) * w - 1]"), "one_column_short"),
        Mutant("q, k, v in turn", _head("weight.view(d, n_head, w, 3)[:, head, :, p]"), "interleaved"),
        Mutant("a part after one head", _head("weight[:, (p + head) * w :][:, :w]"), "part_begins_at_a_head"),
        Mutant("rows of the part", _head("weight.chunk(3, dim=1)[p].chunk(n_head, dim=0)[head]"), "rows"),
        Mutant("numbers", _head("torch.arange(p * d + head * w, p * d + (head + 1) * w)"), "numbers_of_columns"),
        Mutant("a head of three widths", _head("weight[:, p * d + 3 * head * w : p * d + 3 * (head + 1) * w]"), "width_of_thirds"),
        Mutant("all three of a head", _head("weight[:, 3 * head * w : 3 * (head + 1) * w]"), "all_three"),
    ],
    "5.3": [
        Mutant("both c_proj", _targets('r".*\\.(" + "|".join(map(str, blocks)) + r")\\..*c_proj"'), "mlp_too"),
        Mutant("c_proj in a list", _targets('["c_proj"]'), "mlp_too_and_blocks_ignored"),
        Mutant("attn.c_proj in a list", _targets('["attn.c_proj"]'), "blocks_ignored"),
        Mutant("everywhere, as a pattern", _targets('r".*\\.attn\\.c_proj"'), "blocks_ignored"),
        Mutant("the end of the name as a pattern", _targets('r"h\\.(" + "|".join(map(str, blocks)) + r")\\.attn\\.c_proj"'), "not_the_whole_name"),
        Mutant("attn.c_proj as a pattern", _targets('"attn.c_proj"'), "not_the_whole_name"),
        Mutant("a pattern in a list", _targets('[r".*\\.%d\\.attn\\.c_proj" % b for b in blocks]'), "pattern_in_a_list"),
        Mutant("anything after the number", _targets('".*h.(" + "|".join(map(str, blocks)) + ").*attn.c_proj"'), "digits_after"),
        Mutant("a class of characters", _targets('rf".*h\\.[{\',\'.join(map(str, blocks))}]+\\.attn\\.c_proj"'), "character_class"),
        Mutant("a class of characters, of one", _targets("r'.*h\\.[' + '|'.join(map(str, blocks)) + r']\\.attn\\.c_proj'"), "character_class"),
        Mutant("or without parentheses", _targets("r'transformer\\.h\\.' + '|'.join(map(str, blocks)) + r'\\.attn\\.c_proj'"), "or_without_parentheses"),
        Mutant("all of attention", _targets("r'.*\\.(' + '|'.join(map(str, blocks)) + r')\\.attn\\.c_.*'"), "more_of_attn"),
        Mutant("the MLP's", _targets('[f"h.{b}.mlp.c_proj" for b in blocks]'), "mlp_instead"),
        Mutant("c_attn", _targets('[f"h.{b}.attn.c_attn" for b in blocks]'), "c_attn_instead"),
        Mutant("counts blocks from 1", _targets('[f"h.{b - 1}.attn.c_proj" for b in blocks]'), "off_by_one"),
        Mutant("the first block alone", _targets('[f"h.{blocks[0]}.attn.c_proj"]'), "first_block_alone"),
        Mutant("returns in the loop", "def attention_outputs(blocks):\n    for b in blocks:\n        return [f'h.{b}.attn.c_proj']\n", "first_block_alone"),
        Mutant("overwrites in the loop", "def attention_outputs(blocks):\n    for b in blocks:\n        out = [f'h.{b}.attn.c_proj']\n    return out\n",
               "last_block_alone"),
        Mutant("from the first to the last", _targets('[f"h.{b}.attn.c_proj" for b in range(blocks[0], blocks[-1] + 1)]'), "a_range"),
        Mutant("the list in the name", _targets("[f'transformer.h.{blocks if len(blocks) > 1 else blocks[0]}.attn.c_proj']"), "list_in_a_name"),
        Mutant("as Python writes it", _targets("[f'h[{b}].attn.c_proj' for b in blocks]"), "brackets_in_a_name"),
        Mutant("a dot first", _targets("[f'.{b}.attn.c_proj' for b in blocks]"), "leading_dot"),
        Mutant("commas", _targets("r'.*\\.(' + ','.join(map(str, blocks)) + r')\\.attn\\.c_proj'"), "commas"),
        Mutant("names with commas", _targets("','.join(f'h.{b}.attn.c_proj' for b in blocks)"), "commas"),
        Mutant("the module around", _targets("[f'h.{b}.attn' for b in blocks]"), "whole_attention"),
        Mutant("one digit", _targets("r'.*\\.\\d\\.attn\\.c_proj'"), "one_digit"),
        Mutant("a range of characters", _targets("rf'.*\\.[{min(blocks)}-{max(blocks)}]\\.attn\\.c_proj'"), "character_class"),
        Mutant("parameters", _targets('[f"transformer.h.{b}.attn.c_proj.weight" for b in blocks]'), "names_parameters"),
    ],
    "5.4": [
        Mutant("keeps alpha", _pair(_A, _B, "alpha"), "alpha_kept"),
        Mutant("halves alpha", _pair(_A, _B, "alpha / 2"), "alpha_halved"),
        Mutant("root of 2", _pair(_A, _B, "alpha * 2 ** 0.5"), "alpha_root"),
        Mutant("the scaling", _pair(_A, _B, "alpha / r"), "scaling_given"),
        Mutant("four times alpha", _pair(_A, _B, "4 * alpha"), "alpha_four"),
        Mutant("one A", _pair("A_q + A_v", "cat([B_q, O, B_v])"), "one_A"),
        Mutant("B not spread", _pair(_A, "cat([B_q, O, B_v])"), "B_not_spread"),
        Mutant("A side by side", _pair("cat([A_q, A_v], 1)", _B), "A_side_by_side"),
        Mutant("A side by side, B one above the other", _pair("cat([A_q, A_v], 1)", "cat([B_q, O, B_v])"), "A_side_by_side"),
        Mutant("k left out", _pair(_A, "torch.block_diag(B_q, B_v)"), "k_left_out"),
        Mutant("rank for k", _pair("cat([A_q, torch.zeros_like(A_q), A_v])", "torch.block_diag(B_q, O, B_v)", "3 * alpha"), "rank_of_k"),
        Mutant("no zeros beside", _pair(_A, "cat([cat([B_q, B_q], 1), cat([O, O], 1), cat([B_v, B_v], 1)])"), "crossed"),
        Mutant("both in both", _pair(_A, "cat([cat([B_q, B_v], 1), cat([O, O], 1), cat([B_q, B_v], 1)])"), "shared"),
        Mutant("v in k's place", _pair(_A, "cat([cat([B_q, O], 1), cat([O, B_v], 1), cat([O, O], 1)])"), "v_in_k"),
        Mutant("zeros first", _pair(_A, "cat([cat([O, O], 1), cat([B_q, O], 1), cat([O, B_v], 1)])"), "parts_shifted"),
        Mutant("A in the other order", _pair("cat([A_v, A_q])", _B), "wrong_A"),
        Mutant("q and v exchanged", _pair("cat([A_v, A_q])", "cat([cat([B_v, O], 1), cat([O, O], 1), cat([O, B_q], 1)])"), "q_and_v_swapped"),
        Mutant("B first", _pair(_B, _A), "order"),
        Mutant("transposed", _pair(f"{_A}.T", f"{_B}.T"), "transposed"),
        Mutant("B side by side", _pair(_A, "cat([B_q, O, B_v], 1)"), "B_side_by_side"),
        Mutant("v in the first columns", _pair(_A, "cat([cat([B_q, O], 1), cat([O, O], 1), cat([B_v, O], 1)])"), "v_reads_A_q"),
        Mutant("everything in q's rows", _pair(_A, "cat([cat([B_q, B_v], 1), cat([O, O], 1), cat([O, O], 1)])"), "all_in_q"),
        Mutant("scaled already", _pair(_A, f"alpha / r * {_B}", "2 * alpha"), "scaled_twice"),
        Mutant("alpha times r", _pair(_A, _B, "2 * alpha * r"), "alpha_times_r"),
        Mutant("crossed, and alpha kept", _pair(_A, "cat([cat([B_q, B_q], 1), cat([O, O], 1), cat([B_v, B_v], 1)])", "alpha"), "crossed_and_alpha_kept"),
        Mutant("q's update for k, too", _pair(_A, "cat([cat([B_q, O], 1), cat([B_q, O], 1), cat([O, B_v], 1)])"), "k_as_well"),
    ],
    "5.5": [
        Mutant("in times out", _rank("budget // (blocks * sum(i * o for i, o in shapes))"), "product"),
        Mutant("A alone", _rank("budget // (blocks * sum(i for i, o in shapes))"), "A_alone"),
        Mutant("B alone", _rank("budget // (blocks * sum(o for i, o in shapes))"), "B_alone"),
        Mutant("2 d for each", _rank("budget // (blocks * sum(2 * i for i, o in shapes))"), "twice_in"),
        Mutant("forgets the blocks", _rank(f"budget // {_IN_OUT}"), "blocks_forgotten"),
        Mutant("the first shape", _rank("budget // (blocks * sum(shapes[0]))"), "first_shape_alone"),
        Mutant("the first shape for all", _rank("budget // (blocks * len(shapes) * sum(shapes[0]))"), "first_for_all"),
        Mutant("rounds up", _rank(f"math.ceil(budget / (blocks * {_IN_OUT}))"), "up"),
        Mutant("rounds", _rank(f"round(budget / (blocks * {_IN_OUT}))"), "nearest"),
        Mutant("not rounded", _rank(f"budget / (blocks * {_IN_OUT})"), "not_rounded"),
        Mutant("at least 1", _rank(f"max(1, budget // (blocks * {_IN_OUT}))"), "at_least_1"),
        Mutant("a float", _rank(f"float(budget // (blocks * {_IN_OUT}))"), "a_float"),
        Mutant("the same share for each", _rank("min(budget // len(shapes) // blocks // (i + o) for i, o in shapes)"), "split_first"),
        Mutant("twice in + out", _rank("budget // (2 * blocks * sum(i + o for i, o in shapes))"), "doubled"),
        Mutant("the whole budget for each", _rank("min(budget // (blocks * (i + o)) for i, o in shapes)"), "whole_budget_for_each"),
        Mutant("the first that is too dear", """
def largest_rank(budget, shapes, blocks):
    r = 1
    while blocks * sum(r * (i + o) for i, o in shapes) <= budget:
        r += 1
    return r
""", "one_too_many"),
        Mutant("less than the budget", """
def largest_rank(budget, shapes, blocks):
    r = 0
    while blocks * sum((r + 1) * (i + o) for i, o in shapes) < budget:
        r += 1
    return r
""", "budget_not_spent"),
        Mutant("in times out, not rounded", _rank("budget / (blocks * sum(i * o for i, o in shapes))"), "product_and_not_rounded"),
        Mutant("forgets the blocks, rounds up", _rank(f"-(-budget // {_IN_OUT})"), "blocks_forgotten_and_up"),
    ],
}

ALTERNATIVES = {
    "5.1": [
        _merged("weight + s * A.T @ B.T"),
        _merged("(weight.T + s * B @ A).T"),
        _merged("torch.addmm(weight, A.t(), B.t(), alpha=s)"),
        "def merged_conv1d(weight, A, B, alpha, r):\n    return weight + torch.einsum('or,ri->io', B, A).mul(alpha).div(r)\n",
    ],
    "5.2": [
        _head("weight.reshape(d, 3, n_head, w)[:, p, head]"),
        _head("weight.chunk(3, dim=1)[p].chunk(n_head, dim=1)[head]"),
        _head("weight.T.reshape(3, n_head, w, d)[p, head].T"),
        "def head_columns(weight, part, head, n_head):\n    q, k, v = weight.split(weight.shape[0], dim=1)\n    "
        "width = q.shape[1] // n_head\n    return {'q': q, 'k': k, 'v': v}[part][:, head * width : head * width + width]\n",
    ],
    "5.3": [
        _targets('[f"h.{b}.attn.c_proj" for b in blocks]'),
        _targets('[f"transformer.h.{b}.attn.c_proj" for b in blocks]'),
        _targets('"|".join(rf".*\\.h\\.{b}\\.attn\\.c_proj" for b in blocks)'),
        _targets('r"(\\w+\\.)*h\\.(?:" + "|".join(str(b) for b in blocks) + r")\\.attn\\.c_proj"'),
        _targets('tuple(f"{b}.attn.c_proj" for b in blocks)'),
    ],
    "5.4": [
        _pair("cat([A_v, A_q])", "cat([cat([O, B_q], 1), cat([O, O], 1), cat([B_v, O], 1)])"),
        _pair(_A, f"2 * {_B}", "alpha"),
        _pair("2 * cat([A_q, A_v])", _B, "alpha"),
        """
def as_one_pair(A_q, B_q, A_v, B_v, alpha):
    d, r = B_q.shape
    B = torch.zeros(3 * d, 2 * r, dtype=B_q.dtype)
    B[:d, :r] = B_q
    B[2 * d :, r:] = B_v
    return torch.vstack([A_q, A_v]), B, torch.tensor(2.0 * alpha)
""",
    ],
    "5.5": [
        _rank("int(budget / blocks / sum(map(sum, shapes)))"),
        """
def largest_rank(budget, shapes, blocks):
    r = 0
    while blocks * sum((r + 1) * (i + o) for i, o in shapes) <= budget:
        r += 1
    return r
""",
        _rank("math.floor(budget / sum(i + o for _ in range(blocks) for i, o in shapes))"),
    ],
}
