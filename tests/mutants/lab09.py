"""Lab 09: wrong answers that students and chatbots give about LoRA's rivals, and right ones in another style."""

from . import Mutant


def _adapter(expression: str) -> str:
    return f"def adapter_forward(h, down, b_down, up, b_up):\n    return {expression}\n"


def _count(**formulas) -> str:
    right = {
        "lora": "blocks * 4 * size * d", "adapters": "blocks * 2 * (2 * size * d + size + d)", "prompt": "size * d", "prefix": "blocks * size * d",
        "bitfit": "11 * blocks * d + d",
    }  # fmt: skip
    lines = "".join(f"    if method == {name!r}:\n        return {formula}\n" for name, formula in (right | formulas).items())
    return f"def trained_numbers(method, d, blocks, size=0):\n{lines}"


def _bits(rows="w.view(-1, block)", largest="rows.abs().amax(1, keepdim=True)", scales="largest / 7", codes="(rows / scales.clamp(min=1e-30)).round()",
          restored="codes * scales", result="codes.flatten(), scales.flatten(), restored.flatten()") -> str:  # fmt: skip
    return f"""
def to_4_bits(w, block):
    rows = {rows}
    largest = {largest}
    scales = {scales}
    codes = {codes}
    restored = {restored}
    return {result}
"""


def _distil(expression: str, student="student / T", teacher="teacher / T") -> str:
    return f"""
def distillation_loss(student, teacher, T):
    p, q = F.log_softmax({teacher}, -1), F.log_softmax({student}, -1)
    return {expression}
"""


def _mixed(expression: str) -> str:
    return f"def mixed_lora(x, W, A, B, tasks, scaling):\n    return {expression}\n"


MUTANTS = {
    "9.1": [
        Mutant("no residual", _adapter("torch.relu(h @ down.T + b_down) @ up.T + b_up"), "residual_missing"),
        Mutant("no activation", _adapter("h + (h @ down.T + b_down) @ up.T + b_up"), "linear"),
        Mutant("activation last", _adapter("h + torch.relu((h @ down.T + b_down) @ up.T + b_up)"), "activation_last"),
        Mutant("activation on the sum", _adapter("torch.relu(h + (h @ down.T + b_down) @ up.T + b_up)"), "activation_on_sum"),
        Mutant("two activations", _adapter("h + torch.relu(torch.relu(h @ down.T + b_down) @ up.T + b_up)"), "activation_twice"),
        Mutant("bias behind the activation", _adapter("h + (torch.relu(h @ down.T) + b_down) @ up.T + b_up"), "bias_after_activation"),
        Mutant("b_down forgotten", _adapter("h + torch.relu(h @ down.T) @ up.T + b_up"), "down_bias_missing"),
        Mutant("b_up forgotten", _adapter("h + torch.relu(h @ down.T + b_down) @ up.T"), "up_bias_missing"),
        Mutant("no biases", _adapter("h + torch.relu(h @ down.T) @ up.T"), "down_bias_missing_and_up_bias_missing"),
        Mutant("GELU", _adapter("h + F.gelu(h @ down.T + b_down) @ up.T + b_up"), "gelu"),
        Mutant("not transposed", _adapter("h + torch.relu(h @ down + b_down) @ up + b_up"), "not_transposed"),
        Mutant("no residual, no activation", _adapter("(h @ down.T + b_down) @ up.T + b_up"), "residual_missing_and_linear"),
        Mutant("under no_grad", "def adapter_forward(h, down, b_down, up, b_up):\n    with torch.no_grad():\n"
               "        return h + torch.relu(h @ down.T + b_down) @ up.T + b_up\n", "detached"),
        Mutant("h twice", _adapter("h + F.linear(F.relu(F.linear(h, down, b_down)), up, b_up) + h"), "residual_twice"),
    ],
    "9.2": [
        Mutant("LoRA on one matrix", _count(lora="blocks * 2 * size * d"), "lora_one_matrix"),
        Mutant("LoRA on q, k and v", _count(lora="blocks * 3 * size * (d + d)"), "lora_three_matrices"),
        Mutant("LoRA as large as the matrix", _count(lora="blocks * 2 * d * d"), "lora_full"),
        Mutant("LoRA in one block", _count(lora="2 * size * (d + d)"), "lora_one_block"),
        Mutant("adapters without biases", _count(adapters="blocks * 2 * 2 * size * d"), "adapters_without_biases"),
        Mutant("one adapter a block", _count(adapters="blocks * (2 * size * d + size + d)"), "adapters_one_a_block"),
        Mutant("bias of the wrong size", _count(adapters="blocks * 2 * (2 * size * d + 2 * d)"), "adapters_biases_swapped"),
        Mutant("the bias of `up` forgotten", _count(adapters="blocks * 2 * (2 * size * d + size)"), "adapters_bias_of_up_missing"),
        Mutant("a prompt in every block", _count(prompt="blocks * size * d"), "prompt_in_every_block"),
        Mutant("a prompt of numbers", _count(prompt="size"), "prompt_without_d"),
        Mutant("a prefix once", _count(prefix="size * d"), "prefix_once"),
        Mutant("keys and values", _count(prefix="2 * blocks * size * d"), "prefix_keys_and_values"),
        Mutant("BitFit without norms", _count(bitfit="9 * blocks * d"), "bitfit_norms_missing"),
        Mutant("BitFit without the last norm", _count(bitfit="11 * blocks * d"), "bitfit_last_norm_missing"),
        Mutant("BitFit with the norms' weights", _count(bitfit="13 * blocks * d + 2 * d"), "bitfit_norm_weights"),
        Mutant("every bias has d numbers", _count(bitfit="6 * blocks * d + d"), "bitfit_d_each"),
    ],
    "9.3": [
        Mutant("one scale", _bits(largest="w.abs().max().expand(len(rows), 1)"), "one_scale"),
        Mutant("no absolute value", _bits(largest="rows.amax(1, keepdim=True)"), "signed_max"),
        Mutant("every k-th weight", _bits(rows="w.view(block, -1).T", result="codes.T.flatten(), scales.flatten(), restored.T.flatten()"), "strided_blocks"),
        Mutant("divided by 8", _bits(scales="largest / 8"), "divided_by_8"),
        Mutant("divided by 16", _bits(scales="largest / 16"), "divided_by_16"),
        Mutant("int8's 127", _bits(scales="largest / 127"), "eight_bits"),
        Mutant("absmax as the scale", _bits(scales="largest"), "not_divided"),
        Mutant("rounds down", _bits(codes="(rows / scales.clamp(min=1e-30)).floor()"), "floored"),
        Mutant("int() cuts off", _bits(codes="(rows / scales.clamp(min=1e-30)).int()"), "truncated"),
        Mutant("not rounded", _bits(codes="rows / scales.clamp(min=1e-30)"), "not_rounded"),
        Mutant("restores the codes", _bits(restored="codes"), "restored_codes"),
        Mutant("gives w back", _bits(restored="rows"), "restored_original"),
        Mutant("restores by dividing", _bits(restored="codes / scales.clamp(min=1e-30)"), "restored_divided"),
        Mutant("restores with absmax", _bits(restored="codes * largest"), "restored_largest"),
        Mutant("0 / 0", _bits(codes="(rows / scales).round()"), "zero_block"),
        Mutant("scales for multiplying", _bits(scales="7 / largest.clamp(min=1e-30)", codes="(rows * scales).round()", restored="codes / scales"),
               "scales_inverted"),
        Mutant("codes as stored", _bits(codes="(rows / scales.clamp(min=1e-30)).round() + 8", restored="(codes - 8) * scales"), "shifted"),
        Mutant("absmax / 8, clamped", _bits(scales="largest / 8", codes="(rows / scales.clamp(min=1e-30)).round().clamp(-8, 7)"),
               "divided_by_8_and_clamped"),
        Mutant("asymmetric, with a zero point", """
def to_4_bits(w, block):
    rows = w.view(-1, block)
    low = rows.amin(1, keepdim=True)
    scales = (rows.amax(1, keepdim=True) - low) / 15
    codes = ((rows - low) / scales.clamp(min=1e-30)).round()
    return codes.flatten(), scales.flatten(), (codes * scales + low).flatten()
""", "zero_point"),
        Mutant("max - min", _bits(largest="rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)"), "range_scale"),
        Mutant("max - min over 15 steps", _bits(largest="rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)", scales="largest / 15"),
               "range_scale_and_divided_by_15"),
    ],
    "9.4": [
        Mutant("T² forgotten", _distil("(p.exp() * (p - q)).sum(-1).mean()"), "factor_missing"),
        Mutant("T once", _distil("T * (p.exp() * (p - q)).sum(-1).mean()"), "factor_T"),
        Mutant("swapped", _distil("T**2 * (q.exp() * (q - p)).sum(-1).mean()"), "reversed"),
        Mutant("kl_div's arguments swapped", _distil("T**2 * F.kl_div(p, q.exp(), reduction='none').sum(-1).mean()"), "reversed"),
        Mutant("cross-entropy", _distil("-T**2 * (p.exp() * q).sum(-1).mean()"), "cross_entropy"),
        Mutant("mean", _distil("T**2 * F.kl_div(q, p.exp(), reduction='mean')"), "mean_over_classes"),
        Mutant("kl_div as it comes", _distil("T**2 * F.kl_div(q, p.exp())"), "mean_over_classes"),
        Mutant("batchmean", _distil("T**2 * F.kl_div(q, p.exp(), reduction='batchmean')"), "batch_only"),
        Mutant("sum", _distil("T**2 * (p.exp() * (p - q)).sum()"), "summed"),
        Mutant("the teacher alone is softened", _distil("T**2 * (p.exp() * (p - q)).sum(-1).mean()", student="student"), "teacher_only"),
        Mutant("the student alone is softened", _distil("T**2 * (p.exp() * (p - q)).sum(-1).mean()", teacher="teacher"), "student_only"),
        Mutant("no temperature", _distil("T**2 * (p.exp() * (p - q)).sum(-1).mean()", "student", "teacher"), "temperature_missing"),
        Mutant("logits times T", _distil("T**2 * (p.exp() * (p - q)).sum(-1).mean()", "student * T", "teacher * T"), "multiplied"),
        Mutant("softmax first", _distil("T**2 * F.kl_div(q.exp(), p.exp(), reduction='none').sum(-1).mean()"), "probabilities_not_logs"),
        Mutant("logits first", _distil("T**2 * F.kl_div(student / T, p.exp(), reduction='none').sum(-1).mean()"), "logits_not_logs"),
        Mutant("two logs", _distil("T**2 * F.kl_div(q, p, reduction='none').sum(-1).mean()"), "log_of_negative"),
        Mutant("probabilities divided", """
def distillation_loss(student, teacher, T):
    p, q = torch.softmax(teacher, -1) / T, torch.softmax(student, -1) / T
    return T**2 * (p * (p / q).log()).sum(-1).mean()
""", "probabilities_divided"),
        Mutant("dim=1", "def distillation_loss(s, t, T):\n    p, q = F.log_softmax(t / T, 1), F.log_softmax(s / T, 1)\n"
               "    return T**2 * (p.exp() * (p - q)).sum(-1).mean()\n", "softmax_over_dim_1"),
        Mutant("mean and no T²", _distil("F.kl_div(q, p.exp(), reduction='mean')"), "factor_missing_and_mean_over_classes"),
    ],
    "9.5": [
        Mutant("adapter 0 for all", _mixed("x @ W.T + scaling * x @ A[0].T @ B[0].T"), "first_adapter"),
        Mutant("row i, adapter i", _mixed("torch.stack([r @ W.T + scaling * r @ A[i % len(A)].T @ B[i % len(A)].T for i, r in enumerate(x)])"), "by_place"),
        Mutant("all adapters added", _mixed("x @ W.T + scaling * sum(x @ a.T @ b.T for a, b in zip(A, B))"), "all_added"),
        Mutant("averaged", _mixed("x @ W.T + scaling * sum(x @ a.T @ b.T for a, b in zip(A, B)) / len(A)"), "averaged"),
        Mutant("factors averaged", _mixed("x @ W.T + scaling * x @ A.mean(0).T @ B.mean(0).T"), "factors_averaged"),
        Mutant("row 0 decides", _mixed("x @ W.T + scaling * x @ A[tasks[0]].T @ B[tasks[0]].T"), "task_of_row_0"),
        Mutant("the base forgotten", _mixed("scaling * x @ A[tasks].mT @ B[tasks].mT"), "base_missing"),
        Mutant("the base scaled", _mixed("scaling * (x @ W.T + x @ A[tasks].mT @ B[tasks].mT)"), "base_scaled"),
        Mutant("the scaling forgotten", _mixed("x @ W.T + x @ A[tasks].mT @ B[tasks].mT"), "scaling_missing"),
        Mutant("only the base", _mixed("x @ W.T"), "update_missing"),
        Mutant("a loop that overwrites", """
def mixed_lora(x, W, A, B, tasks, scaling):
    for t in tasks:
        y = x @ W.T + scaling * x @ A[t].T @ B[t].T
    return y
""", "task_of_last_row"),
        Mutant("groups that stay sorted", """
def mixed_lora(x, W, A, B, tasks, scaling):
    parts = []
    for t in range(len(A)):
        mine = x[tasks == t]
        parts.append(mine @ W.T + scaling * mine @ A[t].T @ B[t].T)
    return torch.cat(parts)
""", "grouped_order"),
        Mutant("merged for the batch", """
def mixed_lora(x, W, A, B, tasks, scaling):
    W = W + scaling * sum(B[t] @ A[t] for t in tasks) / len(tasks)
    return x @ W.T
""", "updates_mixed"),
        Mutant("merged one after the other", """
def mixed_lora(x, W, A, B, tasks, scaling):
    for t in tasks:
        W = W + scaling * B[t] @ A[t]
    return x @ W.T
""", "updates_added"),
    ],
}

ALTERNATIVES = {
    "9.1": [
        _adapter("h + F.linear(F.relu(F.linear(h, down, b_down)), up, b_up)"),
        "def adapter_forward(h, down, b_down, up, b_up):\n    z = torch.einsum('...d,md->...m', h, down) + b_down\n    z[z < 0] = 0\n"
        "    return torch.einsum('...m,dm->...d', z, up) + b_up + h\n",
    ],
    "9.2": [
        _count(),
        "def trained_numbers(method, d, blocks, size=0):\n    once = {'prompt': size * d, 'bitfit': d}.get(method, 0)\n"
        "    each = {'lora': 2 * (size * d + d * size), 'adapters': 2 * (d * size + size + size * d + d), 'prefix': size * d,\n"
        "            'bitfit': sum((3 * d, d, 4 * d, d, d, d))}.get(method, 0)\n    return once + blocks * each\n",
    ],
    "9.3": [
        _bits(),
        """
def to_4_bits(w, block):
    codes, scales = torch.zeros_like(w), torch.zeros(len(w) // block, dtype=w.dtype)
    for k in range(len(scales)):
        part = w[k * block : (k + 1) * block]
        scales[k] = part.abs().max() / 7
        if scales[k] > 0:
            codes[k * block : (k + 1) * block] = torch.round(part / scales[k]).clamp(-7, 7)
    return codes.to(torch.int8), scales, codes * scales.repeat_interleave(block)
""",
    ],
    "9.4": [
        _distil("T**2 * (p.exp() * (p - q)).sum(-1).mean()"),
        _distil("T * T * F.kl_div(q.flatten(0, -2), p.flatten(0, -2), reduction='batchmean', log_target=True)"),
        "def distillation_loss(student, teacher, T):\n    p, q = torch.softmax(teacher / T, -1), torch.softmax(student / T, -1)\n"
        "    return T**2 * (p * torch.log(p / q)).sum(-1).mean()\n",
    ],
    "9.5": [
        _mixed("x @ W.T + scaling * (x @ A[tasks].mT) @ B[tasks].mT"),
        _mixed("torch.stack([r @ (W + scaling * B[t] @ A[t]).T for r, t in zip(x, tasks)])"),
        _mixed("x @ W.T + scaling * torch.einsum('nti,nri,nor->nto', x, A[tasks], B[tasks])"),
    ],
}
