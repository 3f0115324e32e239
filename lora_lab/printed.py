"""Figures that a paper prints, beside what its own formulas give.

Hu et al. 2021 (arXiv 2106.09685v2; tables as numbered in the PDF) is careful, and still some of its figures are rounded oddly, belong to another
setting, or don't follow from its formulas. Each row of `printed_figures()` is computed here, from shapes; lab 04 shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from .counting import adapter_parameters, lora_parameters, prefix_parameters
from .presets import preset


@dataclass(frozen=True)
class Printed:
    """where: table or section; what: of which setting; printed: as it stands there; computed: by `formula`, in `unit`.

    verdict  "equal" (up to the digits that are printed), "other" (it does not follow from the formula), "read" (right when read as `note` says)
    """

    where: str
    what: str
    printed: str
    computed: float
    formula: str
    verdict: str
    note: str = ""
    unit: str = "parameters"

    def __str__(self) -> str:
        number = f"{self.computed:,}" if isinstance(self.computed, int) else f"{self.computed:.4g}"
        return f"{self.where}: {self.what}: printed {self.printed}, computed {number} {self.unit} ({self.formula})" + (f". {self.note}" if self.note else "")


def printed_figures() -> list[Printed]:
    """The table, in the paper's order."""
    medium, large, gpt3 = preset("gpt2-medium"), preset("gpt2-large"), preset("gpt3-175b")

    def total(a):
        rows = [row for row in a.rows() if not row.tied]
        return sum(_numbers(row) for row in rows)

    def lora(a, matrices, r):
        return a.layers * matrices * lora_parameters(a.d_model, a.d_model, r)

    d, L = gpt3.d_model, gpt3.layers
    four, base = lora(gpt3, 2, 4), 175_255_800_000
    rows = [
        ("table 3", "GPT-2 medium, all parameters", "354.92M", total(medium), "12 d² + 13 d a block, embeddings, last LayerNorm", "other", ""),
        ("table 3", "GPT-2 medium, LoRA on W_q, W_v, r=4", "0.35M", lora(medium, 2, 4), "2 L · 2 d r", "other",
         "0.39 M. 0.35 M is 0.1 % of the model, the budget of the prefix-tuning row; the authors' checkpoint has the computed number"),
        ("table 3", "GPT-2 medium, Adapter-L, bottleneck 6", "0.37M", adapter_parameters(medium.d_model, 6, 24, 24),
         "L (2 d r + r + d) + 2 L d", "equal", ""),
        ("table 3", "GPT-2 medium, Adapter-L, bottleneck 224", "11.09M", adapter_parameters(medium.d_model, 224, 24, 24),
         "L (2 d r + r + d) + 2 L d", "equal", ""),
        ("table 3", "GPT-2 medium, Adapter-H, nearest bottleneck 112", "11.09M", adapter_parameters(medium.d_model, 112, 48),
         "2 L (2 d r + r + d)", "other", "112 is the nearest width"),
        ("table 3", "GPT-2 medium, the top two blocks", "25.19M", 2 * (12 * 1024**2 + 13 * 1024), "2 (12 d² + 13 d)", "equal", ""),
        ("table 3", "GPT-2 large, LoRA on W_q, W_v, r=4", "0.77M", lora(large, 2, 4), "2 L · 2 d r", "other", "0.74 M"),
        ("table 3", "GPT-2 large, Adapter-L, bottleneck 8", "0.88M", adapter_parameters(large.d_model, 8, 36, 36),
         "L (2 d r + r + d) + 2 L d", "equal", ""),
        ("table 3", "GPT-2 large, Adapter-L, bottleneck 248", "23.00M", adapter_parameters(large.d_model, 248, 36, 36),
         "L (2 d r + r + d) + 2 L d", "equal", ""),
        ("table 4", "GPT-3, all parameters", "175,255.8M", total(gpt3), "12 d² + 13 d a block, embeddings, last LayerNorm", "other",
         "0.4 % more than its published shapes give"),
        ("table 4", "GPT-3, LoRA, r_q = r_v = 1", "4.7M", lora(gpt3, 2, 1), "2 L · 2 d r", "equal", ""),
        ("table 4", "GPT-3, LoRA, r_q = r_v = 8", "37.7M", lora(gpt3, 2, 8), "2 L · 2 d r", "equal", ""),
        ("table 4", "GPT-3, AdapterH, bottleneck 1", "7.1M", adapter_parameters(d, 1, 2 * L), "2 L (2 d r + r + d)", "equal", ""),
        ("table 4", "GPT-3, AdapterH, bottleneck 8", "40.1M", adapter_parameters(d, 8, 2 * L), "2 L (2 d r + r + d)", "equal", ""),
        ("table 4", "GPT-3, PreEmbed, 256 + 8", "3.2M", prefix_parameters(d, 256, 8), "d (lp + li)", "equal", ""),
        ("table 4", "GPT-3, PreLayer, 8 + 8", "20.2M", prefix_parameters(d, 8, 8, L), "L d (lp + li)", "other", ""),
        ("table 15", "GPT-3, LoRA on all four, r=64", "603.8M", lora(gpt3, 4, 64), "4 L · 2 d r", "other",
         "604.0 M; cut instead of rounded it would be 603.9 M"),
        ("table 15", "GPT-3, LoRA on all four, r=2", "18.8M", lora(gpt3, 4, 2), "4 L · 2 d r", "read", "cut, not rounded: 18.9 M"),
        ("table 15", "GPT-3, PreLayer, 2 + 2", "5.1M", prefix_parameters(d, 2, 2, L), "L d (lp + li)", "other", ""),
        ("table 15", "GPT-3, PreLayer, 8 + 0", "10.1M", prefix_parameters(d, 8, 0, L), "L d (lp + li)", "other", ""),
        ("table 15", "GPT-3, PreLayer, 32 + 4", "44.1M", prefix_parameters(d, 32, 4, L), "L d (lp + li)", "other", ""),
        ("table 15", "GPT-3, PreLayer, 64 + 0", "76.1M", prefix_parameters(d, 64, 0, L), "L d (lp + li)", "other", ""),
        ("section D.4", "GPT-3, 37.7M with LoRA on all four", "r=2", 37_748_736 // lora(gpt3, 4, 1), "37,748,736 / (4 L · 2 d)", "other",
         "a misprint: table 15 has r=4", "as r"),
        ("abstract", "fewer trainable parameters, GPT-3", "10,000 times", base / four, "175,255.8M / (2 L · 2 d r), r=4", "read",
         f"it belongs to 18.9 M (r=4); at the 4.7 M of table 4 it is {base / lora(gpt3, 2, 1):,.0f} times", "times"),
        ("section 4.2", "memory for training GPT-3", "1.2TB to 350GB", 1200 / 350, "1.2 TB / 350 GB", "read",
         "3.4 times less, not 10,000: the frozen weights stay", "times less"),
        ("section 4.2", "checkpoint of GPT-3, r=4", "35MB", 2 * four / 2**20, "2 bytes · 18,874,368", "read", "36 MiB, or 37.7 MB", "MiB"),
        ("section 4.2", "100 models of GPT-3", "354GB instead of 35TB", 350 + 100 * 0.035, "350 GB + 100 · 35 MB", "equal", "", "GB"),
        ("section 4.2", "faster training", "25%", 100 * (1 - 32.5 / 43.1), "1 - 32.5 / 43.1 tokens/s", "read",
         f"24.6 % less time; as throughput it is {100 * (43.1 / 32.5 - 1):.1f} % more", "% less time"),
    ]  # fmt: skip
    return [Printed(*row) for row in rows]


def _numbers(row) -> int:
    """Scalars of a module: its weight, and a bias as long as its output."""
    size = 1
    for n in row.shape:
        size *= n
    out = row.shape[-1] if row.kind in ("Conv1D", "LayerNorm") else row.shape[0]
    return size + out * row.bias
